"""Several processes: how they meet, agree, stop and share a model."""
