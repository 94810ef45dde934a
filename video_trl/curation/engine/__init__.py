"""How a stage runs over many rows: a resumable table on one machine, or Ray on a cluster."""
