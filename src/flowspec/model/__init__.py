"""Models, their files and their stages."""
