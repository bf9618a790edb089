"""What is measured, shown and recorded while a run trains."""
