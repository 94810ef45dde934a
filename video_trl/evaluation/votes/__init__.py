"""Human votes between videos: the study, its server, and what the votes say."""
