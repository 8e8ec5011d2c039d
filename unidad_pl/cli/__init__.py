"""The ``unidad`` command."""
