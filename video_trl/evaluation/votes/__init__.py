"""Human votes on pairs of videos: the study, the web server and the results."""
