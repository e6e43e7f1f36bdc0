"""LoRA fine-tuning for Qwen-VL models: from a meta-file of conversations to a merged model."""

__version__ = "0.1.0"
