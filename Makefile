# make             builds build/mp: for CUDA if there are nvcc and a GPU, else for the CPU
# make run         learns the digits in data/;  make run ARGS="--precision fp32" passes options on
# make test        runs all tests;  make test SANITIZE=1 runs them under AddressSanitizer and UBSan
# make exercises   lists the exercises: pieces of mp.cu for you to write, each with a check and two hints
# make plots       draws data/scale.svg and data/rate.svg again
# make mnist       downloads MNIST into build/mnist;  make digits draws data/ again
# make fuzz        feeds RUNS=100000 damaged inputs to each reader of files, with clang++;  make fuzz READERS=gz: to one
# make cuda-check  compiles for every GPU that this nvcc knows, and needs no GPU itself
# make gpu         tests and measures on a GPU
# make walkthrough copies the regions of mp.cu into walkthrough.md;  make format;  make clean
# BACKEND=cpu or BACKEND=cuda forces one;  CXX=clang++ chooses another compiler
BACKEND ?= $(if $(and $(shell command -v nvcc),$(shell nvidia-smi -L 2>/dev/null)),cuda,cpu)
ARGS =
B = build
WARN = -Wall -Wextra -Wshadow
# Not every compiler knows -march=native.
NATIVE := $(shell $(CXX) -march=native -x c++ -fsyntax-only /dev/null 2>/dev/null && echo -march=native)
OPT = -O2 -g1 $(NATIVE)
ifdef SANITIZE
  B = build/sanitize
  OPT = -O1 -g $(NATIVE) -fsanitize=address,undefined -fno-sanitize-recover=undefined -DMP_ASAN
endif
FLAGS = -std=c++17 $(WARN) $(OPT)
COMPILE = $(CXX) -x c++ $(FLAGS) -pthread
LINK = $(CXX) $(FLAGS) -pthread
ifeq ($(BACKEND),cuda)
  # The GPU's compute capability without its dot, such as 75
  ARCH ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d . | sed s/^90$$/90a/)
  ifeq ($(ARCH),)
    $(error nvidia-smi finds no GPU: make BACKEND=cpu, or name the GPU to build for, as in make BACKEND=cuda ARCH=75)
  endif
  COMPILE = nvcc -x cu -std=c++17 -O3 -arch=sm_$(ARCH) -DMP_CUDA -Xcompiler=-Wall,-Wextra,-Wshadow
  LINK = nvcc -arch=sm_$(ARCH) -lcublas
  FLAGS += -DMP_CUDA
endif

.PHONY: all run test plots packages fuzz mnist digits cuda-check gpu exercises walkthrough format clean FORCE
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
	$(B)/mp compare --sweep scale $(ARGS) | tee /dev/stderr | awk -f data/plot.awk > data/scale.svg
	$(B)/mp compare --sweep lr $(ARGS) | tee /dev/stderr | awk -f data/plot.awk > data/rate.svg

# build/flags changes only when the compiler, the back end or the flags do; then everything is built again.
$(B)/flags: FORCE
	@mkdir -p $(B)
	@echo '$(COMPILE) $(LINK) $(FLAGS)' > $@.new
	@cmp -s $@.new $@ || cp $@.new $@
$(B)/mp.o: mp.cu mp.h $(B)/flags | packages
	$(COMPILE) -c mp.cu -o $@
$(B)/tests.o: tests.cpp mp.h $(B)/flags | packages
	$(CXX) $(FLAGS) -c tests.cpp -o $@
$(B)/mp: $(B)/mp.o
	$(LINK) $^ -o $@
$(B)/tests: $(B)/tests.o $(B)/mp.o
	$(LINK) $^ -o $@

# stb reads pictures, doctest runs the tests. With apt-get they are installed; elsewhere the user is told how.
HEADERS = \043include <stb/stb_image.h>\n\043include <doctest/doctest.h>\n
MISSING = $(shell printf '$(HEADERS)' | $(CXX) -x c++ -fsyntax-only - 2>/dev/null || echo yes)
INSTALL = apt-get install -y -q doctest-dev libstb-dev
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

# Each parser (pictures, data files, checkpoints, options) under AddressSanitizer and UBSan. Inputs that reach new code
# are kept in build/fuzz/corpus.
RUNS = 100000
READERS = picture sheet idx gz safetensors options
build/fuzz/mp: tests.cpp mp.cu mp.h Makefile | packages
	@command -v clang++ >/dev/null || \
	  { echo "make fuzz needs clang++ and its libFuzzer (Debian: clang, libclang-rt-dev)"; exit 1; }
	@mkdir -p build/fuzz
	clang++ -x c++ -std=c++17 $(WARN) -O0 -g $(NATIVE) -DMP_FUZZ -DMP_ASAN -Wno-pass-failed -pthread \
	  -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined tests.cpp -o $@
fuzz: build/fuzz/mp $(B)/tests
	@MP_SEEDS=build/fuzz/corpus $(B)/tests --no-skip --test-suite=fuzz >/dev/null
	@for reader in $(READERS); do \
	  MP_READER=$$reader build/fuzz/mp -runs=$(RUNS) -max_len=4096 -rss_limit_mb=1024 -malloc_limit_mb=2048 -timeout=60 \
	    -verbosity=0 -print_final_stats=1 -artifact_prefix=build/fuzz/$$reader- build/fuzz/corpus/$$reader \
	    >build/fuzz/log 2>&1 || { cat build/fuzz/log; echo "$$reader fails; the input is in build/fuzz/$$reader-*"; exit 1; }; \
	  echo "$$reader: $$(sed -n 's/stat::number_of_executed_units: *//p' build/fuzz/log) inputs, no finding"; \
	done

MNIST = https://ossci-datasets.s3.amazonaws.com/mnist
build/mnist/%.gz:
	@mkdir -p build/mnist
	@echo "downloading $(MNIST)/$*.gz"
	@curl -fsSL $(MNIST)/$*.gz -o build/mnist/part || \
	  { echo "could not download $(MNIST)/$*.gz: is the network up, and is curl installed?"; exit 1; }
	@mv build/mnist/part $@
mnist: $(patsubst %,build/mnist/%-ubyte.gz,train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1)
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

# The GPUs from a T4 on that this nvcc knows, with warnings as errors
GPUS = $(shell mkdir -p build/cuda; for a in 75 80 90a 100 120; do nvcc -x cu -arch=sm_$$a -cubin -o build/cuda/known /dev/null 2>/dev/null && \
  echo "-gencode arch=compute_$$a,code=sm_$$a"; done)
cuda-check: | packages
	@command -v nvcc >/dev/null || { echo "make cuda-check needs nvcc, from the CUDA Toolkit; it needs no GPU"; exit 1; }
	@mkdir -p build/cuda
	nvcc -x cu -std=c++17 -O3 -DMP_CUDA -Werror all-warnings -Xcompiler=-Wall,-Wextra,-Wshadow,-Werror --threads 0 \
	  $(GPUS) -c mp.cu -o build/cuda/mp.o
	$(CXX) -std=c++17 $(WARN) -Werror -O1 -DMP_CUDA -c tests.cpp -o build/cuda/tests.o
	nvcc build/cuda/tests.o build/cuda/mp.o -lcublas -o build/cuda/tests
	nvcc build/cuda/mp.o -lcublas -o build/cuda/mp
# On a machine with a GPU, in ten minutes at most: rates, tests, memory errors, races; then a table of them for README.md.
gpu:
	$(MAKE) BACKEND=cuda all build/tests
	-mkdir -p build/gpu; timeout 150 build/mp bench >build/gpu/bench
	-MP_PROGRAM=build/mp timeout 180 build/tests >build/gpu/tests
	-for tool in memcheck racecheck initcheck synccheck; do timeout 50 compute-sanitizer --tool $$tool build/tests \
	  -ts="E*,gemm*,train_step,unscale*,loss*,update*,stochastic*" -tce="K*" >build/gpu/$$tool; done
	@cd build/gpu; awk 'NR == 1 || /batch|rung|^784|^A.* 4096 .*(fp32 *tiled|mma)|cases:|SUMMARY/ { gsub(/ *[|] */, ", "); \
	  print "| " FILENAME " | " $$0 " |" } NR == 1 { print "| --- | --- |" }' bench tests *check

# ---- Exercises: the regions of mp.cu, emptied one by one. Their titles and hints are in walkthrough.md. ----
# A check builds for the CPU without optimising, and compiles the tests once for all exercises: it takes seconds.
CLASS = $(CXX) -x c++ -std=c++17 $(WARN) -Wno-unused $(NATIVE) -pthread
REGIONS = $(shell awk '$$1 == "//{" { print $$2 }' mp.cu)
X = build/exercise-$*
# The limit on a check in seconds. Its signal is ALRM, because doctest takes TERM for a crash of the test.
LIMIT = 60
TIMED = $(if $(shell command -v timeout),timeout -s ALRM $(LIMIT),perl -e 'alarm shift; exec @ARGV' $(LIMIT))
# What mp.cu and walkthrough.md say about the exercise $(1)
code = awk -v name=$(1) '$$1 == "//}" { inside = 0 } inside; $$1 == "//{" && $$2 == name { inside = 1 }'
heading = $$(sed "/^[*][*]Exercise $(1):/q" walkthrough.md | sed -n 's/^\#\#* //p' | tail -1)
title = $$(sed -n "s/^[*][*]Exercise $(1): \(.*\)[.][*][*].*/\1/p" walkthrough.md)
reason = $$(sed -n "/^[*][*]Exercise $(1):/,/^When it passes/s/^When it passes: //p" walkthrough.md)
hint = echo "hint $(2) of 2:"; sed -n "/summary>$(1), two hints</,/details>/s/^$(2)[.] //p" walkthrough.md | fold -s -w 100
# Conditions of the rules below, each with what it says where it does not hold
KNOWN = test -n "$(filter $*,$(REGIONS))" || { echo "there is no exercise $*; make exercises lists them"; exit 1; }
STARTED = test -d $(X) || { echo "$*: not started. make exercise-$* makes $(X) for you"; exit 1; }
MARKED = grep -Eq '//[{] $*( |$$)' $(X)/mp.cu || \
  { echo "$*: the lines //{ $* and //} are gone from $(X)/mp.cu: put them back around your code"; exit 1; }
WRITTEN = $(call code,$*) $(X)/mp.cu | grep -Evq '^ *(//.*)?$$' || \
  { echo "$*: not started: the region in $(X)/mp.cu is still empty. make hint-$* helps"; exit 1; }

exercises:
	@for name in $(REGIONS); do \
	  folder=build/exercise-$$name; \
	  if ! test -d $$folder || ! $(call code,$$name) $$folder/mp.cu | grep -Evq '^ *(//.*)?$$'; then state="not started"; \
	  elif test $$folder/passed -nt $$folder/mp.cu; then state=done; \
	  elif test $$folder/tried -nt $$folder/mp.cu; then state="tried, fails"; \
	  else state="not checked"; fi; \
	  printf '%-12s  %-19s  %s\n' "$$state" $$name "$(call title,$$name)"; \
	done
	@echo "Begin one with make exercise-NAME; edit build/exercise-NAME/mp.cu; make check-NAME; make hint-NAME"
exercise-%:
	@$(KNOWN)
	@test ! -e $(X) || { echo "$(X) holds your work and stays. To begin anew: rm -r $(X), then make exercise-$*"; exit 1; }
	@mkdir -p $(X)
	@cp Makefile mp.h tests.cpp walkthrough.md $(X)
	@ln -s ../../data $(X)/data
	@awk -v name=$* '$$1 == "//}" { inside = 0 } !inside; \
	  $$1 == "//{" && $$2 == name { inside = 1; sub(/\/\/.*/, "// your code"); print }' mp.cu > $(X)/mp.cu
	@echo "$*: $(call title,$*)"
	@echo "walkthrough.md, $(call heading,$*)"
	@line=$$(sed -n '/\/\/ your code/=' $(X)/mp.cu); \
	  echo "Write your code in $(X)/mp.cu, line $$line, between //{ $* and //}; then make check-$*"
check-%:
	@$(KNOWN)
	@$(STARTED)
	@$(MARKED)
	@$(WRITTEN)
	@$(MAKE) -s build/class/tests.o
	@touch $(X)/tried; rm -f $(X)/passed
	@line=$$(awk '$$1 == "//{" && $$2 == "$*" { print NR }' $(X)/mp.cu); \
	  echo "$*   $(X)/mp.cu:$$line   walkthrough.md, $(call heading,$*)"
	@cd $(X); if cmp -s mp.h ../../mp.h && cmp -s tests.cpp ../../tests.cpp; then cp ../class/tests.o .; \
	  else $(CLASS) -O1 -c tests.cpp -o tests.o; fi
	@cd $(X); $(CLASS) -O0 -g -c mp.cu -o mp.o 2>errors || \
	  { head -30 errors; echo "$*: mp.cu does not compile. Begin with the first error"; exit 1; }
	@cd $(X); cat errors; $(CXX) -pthread tests.o mp.o -o tests
	@cd $(X); $(TIMED) ./tests --test-suite=$* --reporters=student; \
	case $$? in \
	  0) touch passed;; \
	  124|142) echo "$*: stopped after $(LIMIT) seconds: a loop that never ends, or threads that wait for each other?"; exit 1;; \
	  135|136|137|138|139) echo "$*: crashed. Where? gdb -ex run --args $(X)/tests --test-suite=$*"; \
	    echo "Or: cd $(X) && make test SANITIZE=1 ARGS=--test-suite=$*, which names the line that read or wrote too far"; exit 1;; \
	  *) echo "$*: not yet right. Edit the region, then make check-$* again; make hint-$* (two hints)"; exit 1;; \
	esac
	@echo "$*: done; $(call reason,$*)"
	@next=$$(printf '%s\n' $(REGIONS) | sed -n '/^$*$$/{n;p;}'); test -z "$$next" || echo "Next: make exercise-$$next"
# The first call gives hint 1, the second hint 2, any further one both.
hint-%:
	@$(KNOWN)
	@$(STARTED)
	@case $$(cat $(X)/hinted 2>/dev/null) in \
	  "") $(call hint,$*,1); echo 1 > $(X)/hinted;; \
	  1) $(call hint,$*,2); echo 2 > $(X)/hinted;; \
	  *) $(call hint,$*,1); $(call hint,$*,2); \
	    echo "There is no third hint. The code itself is in walkthrough.md, $(call heading,$*)";; \
	esac
build/class/tests.o: tests.cpp mp.h | packages
	@mkdir -p build/class
	@echo "compiling the tests, once for all exercises"
	$(CLASS) -O1 -c tests.cpp -o $@
# A variant of mp.cu in a folder of its own, for .ci/run
build/class/%/tests: build/class/%/mp.cu mp.h build/class/tests.o
	$(CLASS) -O0 -w -I. -c $< -o build/class/$*/mp.o
	$(CXX) -pthread build/class/tests.o build/class/$*/mp.o -o $@

# Copies each region into walkthrough.md: into the code block after the line <!-- region NAME -->.
# First both files must name the same regions, each once.
walkthrough:
	@mkdir -p build
	@awk '$$1 == "//{" { print $$2 }' mp.cu | sort > build/regions
	@sed -n 's/^<!-- region \([^ ]*\) -->$$/\1/p' walkthrough.md | sort | diff build/regions - || \
	  { echo "walkthrough.md: these regions are in mp.cu (<) or in walkthrough.md (>) alone, or twice"; exit 1; }
	@awk 'NR == FNR && $$1 == "//}" { name = "" } \
	  NR == FNR && name { if (!(name in code)) indent = match($$0, /[^ ]/); code[name] = code[name] substr($$0, indent) "\n" } \
	  NR == FNR && $$1 == "//{" { name = $$2 } \
	  NR == FNR { next } \
	  /^<!-- region / { name = $$3 } \
	  /^```$$/ { copied = 0 } \
	  !copied { print } \
	  /^```cpp/ && name { printf "%s", code[name]; copied = 1; name = "" }' mp.cu walkthrough.md > build/walkthrough.md
	@cmp -s build/walkthrough.md walkthrough.md || cp build/walkthrough.md walkthrough.md
format:
	clang-format -i mp.h mp.cu tests.cpp data/digits.cpp
clean:
	rm -rf build
