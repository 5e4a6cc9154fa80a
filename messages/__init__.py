"""Every type that crosses a process line, one file per boundary, with codec and channel."""
