"""What compressm is compared with: other ways to a small model, each as good and as fast as it can be made."""
