"""What stops a run before it goes wrong; nothing here knows a host."""
