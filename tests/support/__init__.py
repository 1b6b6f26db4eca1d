"""What tests share: oracles, twins in PyTorch, small nets, stand-ins for hardware."""
