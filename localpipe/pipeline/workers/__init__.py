"""What runs inside one worker process: the loop, its edges, its timers and its device."""
