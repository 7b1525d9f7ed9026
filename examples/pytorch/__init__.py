"""SAM and delta-SAM in loops without fairseq: plain PyTorch, Hugging Face's Trainer, Accelerate."""
