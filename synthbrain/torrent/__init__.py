"""Volumes out of a torrent: single pieces of it, all of it, and giving it on."""
