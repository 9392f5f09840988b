"""Everything that knows a sinusoid; reached through the hooks of a problem."""
