"""What happens between processes: starting workers, the job they share, liveness and failure."""
