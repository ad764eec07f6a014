"""Plain torch: the truth that each kernel is tested against, and the path wherever a kernel cannot run."""
