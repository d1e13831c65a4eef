"""What is cached: chunk keys, namespaces, layouts, parts, reasons and errors.

Values and pure functions only; every other package imports this one and it imports none of them.
"""
