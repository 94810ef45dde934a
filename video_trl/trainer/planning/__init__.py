"""What a step costs in memory and operations, counted or estimated before it runs."""
