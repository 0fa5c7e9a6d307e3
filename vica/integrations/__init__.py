"""The model as other programs know it, such as lmms-eval."""
