"""What a run shows: samples, its model card, uploads to the Hub, progress."""
