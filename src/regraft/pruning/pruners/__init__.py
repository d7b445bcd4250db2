"""The built-in pruners, a file each, with settings, statistic, score and weight update."""
