"""Distributed training: rendezvous, voting, signals and sharding."""
