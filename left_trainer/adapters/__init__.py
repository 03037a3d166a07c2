"""What a run keeps of a model: adapter files, the base that an adapter starts from, tasks that it tells apart."""
