"""Fine-tuning on top of HF Trainer: what ``fastbert finetune`` runs."""
