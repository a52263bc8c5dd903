# make            builds build/mp: for CUDA where nvcc and a GPU are there, else for the CPU
# make run        learns the digits in data/;  make run ARGS="--precision fp32" passes options on
# make test       runs all tests;  make test SANITIZE=1 under AddressSanitizer and UBSan
# make plots      draws data/scale.svg, rate.svg and histogram.svg again
# make mnist      downloads MNIST into build/mnist;  make digits draws data/ again
# make cuda-check compiles for every GPU this nvcc knows, GPU or not;  make gpu tests and measures on one;  make format
# make clean
# BACKEND=cpu|cuda forces one;  PORTABLE=1 takes the portable fibers;  CXX=clang++ another compiler
BACKEND ?= $(if $(and $(shell command -v nvcc),$(shell nvidia-smi -L 2>/dev/null)),cuda,cpu)
ARGS =
B = build
WARN = -Wall -Wextra -Wshadow
NATIVE := $(shell $(CXX) -march=native -x c++ -fsyntax-only /dev/null 2>/dev/null && echo -march=native)
OPT = -O2 -g1 $(NATIVE)
ifdef SANITIZE
  B = build/sanitize
  OPT = -O1 -g $(NATIVE) -fsanitize=address,undefined -fno-sanitize-recover=undefined
endif
ifdef PORTABLE
  B = build/portable
  OPT += -DMP_PORTABLE_FIBERS
endif
FLAGS = -std=c++17 $(WARN) $(OPT)
COMPILE = $(CXX) -x c++ $(FLAGS) -pthread
LINK = $(CXX) $(FLAGS) -pthread
ifeq ($(BACKEND),cuda)
  # The GPU's own number, such as 90; Hopper's wgmma needs the a in 90a.
  ARCH ?= $(patsubst 90,90a,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .))
  ifeq ($(ARCH),)
    $(error no GPU answers nvidia-smi: make BACKEND=cpu, or name the GPU to build for, as in make BACKEND=cuda ARCH=75)
  endif
  COMPILE = nvcc -x cu -std=c++17 -O3 -arch=sm_$(ARCH) -DMP_CUDA -Xcompiler=-Wall,-Wextra,-Wshadow
  LINK = nvcc -arch=sm_$(ARCH) -lcublas
  FLAGS += -DMP_CUDA
endif

.PHONY: all run test plots mnist digits cuda-check gpu format clean FORCE
all: $(B)/mp
	@echo "built $(B)/mp ($(BACKEND)). Next: make run, make test, build/mp --help; walkthrough.md tells the story"
run: $(B)/mp
	$(B)/mp train --save build/digits.safetensors $(ARGS)
	@echo "Next: build/mp test build/digits.safetensors            which digits it takes for which"
	@echo "      build/mp train --precision bf16 --update half --lr 0.001   no master weights: it learns next to nothing"
	@echo "      make mnist && build/mp train --data build/mnist --lr 0.2 --epochs 5"
test: $(B)/tests $(B)/mp
	MP_PROGRAM=$(B)/mp $(B)/tests $(ARGS)

plots: $(B)/mp
	$(B)/mp compare --sweep scale --svg data/scale.svg $(ARGS)
	$(B)/mp compare --sweep lr --svg data/rate.svg $(ARGS)
	$(B)/mp histogram --svg data/histogram.svg $(ARGS)

# What the last build was made with; a change of compiler, back end or flags rebuilds.
$(B)/flags: FORCE
	@mkdir -p $(B)
	@echo '$(COMPILE) $(LINK) $(FLAGS)' | cmp -s - $@ || echo '$(COMPILE) $(LINK) $(FLAGS)' > $@
$(B)/mp.o: mp.cu mp.h $(B)/flags | packages
	$(COMPILE) -c mp.cu -o $@
$(B)/tests.o: tests.cpp mp.h $(B)/flags | packages
	$(CXX) $(FLAGS) -c tests.cpp -o $@
$(B)/mp: $(B)/mp.o
	$(LINK) $^ -o $@
$(B)/tests: $(B)/tests.o $(B)/mp.o
	$(LINK) $^ -o $@

# stb reads pictures, doctest tests. On Debian and Ubuntu they are installed, elsewhere named.
MISSING = $(shell printf '\043include <stb/stb_image.h>\n\043include <doctest/doctest.h>\n' | \
            $(CXX) -x c++ -fsyntax-only - 2>/dev/null || echo yes)
INSTALL = apt-get install -y -q doctest-dev libstb-dev
.PHONY: packages
packages:
	@test -z "$(MISSING)" || if command -v apt-get >/dev/null; then \
	  test $$(id -u) = 0 || sudo=sudo; \
	  echo "installing the packages doctest-dev and libstb-dev: $$sudo $(INSTALL)"; \
	  $$sudo $(INSTALL) >/dev/null 2>&1 || { $$sudo apt-get update -q && $$sudo $(INSTALL); }; \
	else \
	  echo "mp needs a C++17 compiler and the headers <doctest/doctest.h> and <stb/stb_image.h>:"; \
	  echo "  Fedora: dnf install doctest-devel stb-devel"; \
	  echo "  macOS:  brew install doctest, and stb_image.h from github.com/nothings/stb in a folder stb/ on CPATH"; \
	  exit 1; \
	fi

MNIST = https://ossci-datasets.s3.amazonaws.com/mnist
mnist:
	@mkdir -p build/mnist
	@cd build/mnist && for f in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do \
	  test -s $$f-ubyte.gz || { echo "downloading $(MNIST)/$$f-ubyte.gz"; \
	    curl -fsSLo part $(MNIST)/$$f-ubyte.gz && mv part $$f-ubyte.gz; } || \
	    { echo "no download of $(MNIST)/$$f-ubyte.gz: is there a network, and curl?"; exit 1; }; done
	@cd build/mnist && printf '%s  %s-ubyte.gz\n' \
	  db8f937d487057fb14a9f0fbe97f0bc8d311ab41b750d41e1ff37c43b9e55e19 train-images-idx3 \
	  51fc562b6747b666fbf6e84ce29d43c3cb5f9c388c664d43b33f02095313405a train-labels-idx1 \
	  cfeddb84311ecf044fc6a5b0f6ee8a24d265d4e83e388400186eb114082f4209 t10k-images-idx3 \
	  e41c74e484045d39b462a7790a4af51301bd9b0b24f0154798d713ec68c45920 t10k-labels-idx1 | \
	  $$(command -v sha256sum || echo shasum -a 256) -c || \
	  { echo "a file in build/mnist is damaged: delete it and run make mnist again"; exit 1; }
	@echo "Next: build/mp train --data build/mnist --lr 0.2 --epochs 5"
digits: | packages
	@mkdir -p build
	$(CXX) -std=c++17 -O2 -ffp-contract=off $(WARN) data/digits.cpp -o build/digits
	build/digits data

# Every GPU from a T4 on that this nvcc knows, warnings as errors; then the tests, linked with it.
cuda-check: | packages
	@command -v nvcc >/dev/null || { echo "make cuda-check needs nvcc, of the CUDA Toolkit; a GPU it does not need"; exit 1; }
	@mkdir -p build/cuda
	nvcc -x cu -std=c++17 -O3 -DMP_CUDA -Werror all-warnings -Xcompiler=-Wall,-Wextra,-Wshadow,-Werror --threads 0 \
	  $$(for a in 75 80 90a 100 120; do nvcc -x cu -arch=sm_$$a -cubin -o build/cuda/known /dev/null 2>/dev/null && \
	  echo "-gencode arch=compute_$$a,code=sm_$$a"; done) -c mp.cu -o build/cuda/mp.o
	$(CXX) -std=c++17 $(WARN) -Werror -O1 -DMP_CUDA -c tests.cpp -o build/cuda/tests.o
	nvcc build/cuda/tests.o build/cuda/mp.o -lcublas -o build/cuda/tests
	nvcc build/cuda/mp.o -lcublas -o build/cuda/mp
# What only a machine with a GPU can show, in some ten minutes: tests, memory errors, races, rates.
gpu:
	$(MAKE) BACKEND=cuda test
	for tool in memcheck racecheck synccheck; do compute-sanitizer --tool $$tool --error-exitcode 1 \
	  build/tests -ts="E*,gemm*,train_step,unscale*,loss*,update*,stochastic*" || exit 1; done
	build/mp bench
	for p in fp32 fp16 bf16; do build/mp train --epochs 3 --precision $$p || exit 1; done
format:
	clang-format -i mp.h mp.cu tests.cpp data/digits.cpp
clean:
	rm -rf build
