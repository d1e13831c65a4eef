"""How a part is sealed: header, checksum, padding, and the codecs of payloads."""
