"""LLaVA-1.5's nine benchmarks: questions, answers by the engine, each benchmark's own score."""
