"""One image's rows over bands, on one device or several: the same arithmetic, up to the last places."""
