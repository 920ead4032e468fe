"""The rival: Ray Train with DeepSpeed as its users write it, without EADT."""
