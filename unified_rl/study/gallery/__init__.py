"""The gallery: what corrections there are, what each one is, and how it weighs a unit.

``unified-rl corrections`` prints it, ``docs/corrections.md`` is written from it. :mod:`.catalogue` reads YAML alone;
the other modules need torch and are imported when they are used.
"""
