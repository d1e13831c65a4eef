"""Material of `make demo`: a real small model, a document with questions, and a scripted dialogue."""
