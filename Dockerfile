# The vica program with all extras that need no compiler.   docker build -t vica .
#   docker run --rm vica                                        the quick start, on the toy models
#   docker run --rm --gpus all -v "$PWD:/data" vica vica ask --model /data/MODEL --image /data/picture.png "..."
FROM python:3.12-slim

WORKDIR /vica
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY vica vica
# torch goes first and alone, as in scripts/setup.sh: nothing that comes later may choose another build of it.
RUN pip install --no-cache-dir --constraint constraints.txt torch \
    && pip install --no-cache-dir --constraint constraints.txt ".[bench,eval]"
COPY configs configs
COPY scripts scripts
COPY examples examples
COPY playground playground
CMD ["python", "-m", "scripts.toy.quickstart"]
