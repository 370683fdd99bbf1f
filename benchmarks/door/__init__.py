"""What benchmarks/gateway.py needs: a bare route to compare with, clients that cost little, a crowd of open streams."""
