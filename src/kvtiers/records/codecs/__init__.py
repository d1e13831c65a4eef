"""Payload codecs, one a file."""
