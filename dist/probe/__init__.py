"""What the machines and their links can do, measured by the ranks of a job that trains nothing."""
