"""What people read: tables in the terminal, pages, summaries of sweeps."""
