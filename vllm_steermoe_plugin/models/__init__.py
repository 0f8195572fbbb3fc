"""What is known of models: architectures, their MoE shape, and why some cannot be steered."""
