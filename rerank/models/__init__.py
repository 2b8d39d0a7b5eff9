"""Models: how they are loaded, made, saved, served and asked."""
