"""Sample videos, evaluation, model card, uploads to the Hub and progress of a run."""
