"""Bounded queues of messages between stages: in memory, shared memory, gloo, NCCL."""
