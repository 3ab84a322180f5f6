"""How a method enters a training loop that other libraries own: Hugging Face Trainer, Accelerate, Lightning, Fabric."""
