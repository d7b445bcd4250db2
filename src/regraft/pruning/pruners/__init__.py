"""The built-in pruners, a file each: settings, what is accumulated, score and update together."""
