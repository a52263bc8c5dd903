# make             builds build/mp: for CUDA if there are nvcc and a GPU, else for the CPU
# make run         learns the digits in data/;  make run ARGS="--precision fp32" passes options on
# make test        runs all tests;  make test SANITIZE=1 runs them under AddressSanitizer and UBSan
# make exercises   lists the exercises: pieces of mp.cu for you to write, each with a check and two hints
# make check-all   checks all that you have begun;  make check-all FOLDERS="DIR DIR": a row for each checkout
# make plots       draws data/scale.svg and data/rate.svg again
# make mnist       downloads MNIST into build/mnist;  make digits draws data/ again
# make fuzz        feeds RUNS=100000 damaged inputs to each reader of files, with clang++;  make fuzz READERS=idx: to one
# make cuda-check  compiles for every GPU that this nvcc knows, and needs none;  make gpu tests and measures on one
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

.PHONY: all run test plots packages fuzz mnist digits cuda-check gpu exercises check-all walkthrough format clean FORCE
all: $(B)/mp
	@echo "built $(B)/mp ($(BACKEND)). Next: make run, make test, build/mp --help"
run: $(B)/mp
	$(B)/mp train --save build/digits.safetensors $(ARGS)
	@echo "Next: build/mp test build/digits.safetensors   which digits it takes for which"
	@echo "      build/mp train --precision bf16 --update half --lr 0.001   hardly learns"
test: $(B)/tests $(B)/mp
	MP_PROGRAM=$(B)/mp $(B)/tests $(ARGS)
PLOT = awk -f data/plot.awk "$(B)/mp train --epochs 3 $(ARGS)"
plots: $(B)/mp
	$(PLOT) --loss-scale -24 24 "--precision fp16" "--precision auto" >build/plot && mv build/plot data/scale.svg
	$(PLOT) --lr -14 -2 "--precision fp16" "--update half" "--precision bf16" "--precision bf16 --update half" >build/plot && \
	  mv build/plot data/rate.svg

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

# stb reads pictures, doctest runs the tests. Without apt-get the user is told how to get them.
HEADERS = \043include <stb/stb_image.h>\n\043include <doctest/doctest.h>\n
MISSING = $(shell printf '$(HEADERS)' | $(CXX) -x c++ -fsyntax-only - 2>/dev/null || echo yes)
INSTALL = apt-get install -y -q doctest-dev libstb-dev
AS_ROOT = $(if $(filter 0,$(shell id -u)),env,$(shell command -v sudo))
packages:
	@test -z "$(MISSING)" || { test -n "$(AS_ROOT)" && command -v apt-get >/dev/null && \
	  echo "installing packages: $(AS_ROOT) $(INSTALL)" && \
	  { $(AS_ROOT) $(INSTALL) >/dev/null 2>&1 || { $(AS_ROOT) apt-get update -q && $(AS_ROOT) $(INSTALL); }; }; } || { \
	  echo "mp needs a C++17 compiler and the headers of doctest and stb. Packages:"; \
	  echo "  Debian doctest-dev and libstb-dev, Fedora doctest-devel and stb-devel. Else put"; \
	  echo "  doctest.h from github.com/doctest/doctest into ~/include/doctest/ and"; \
	  echo "  stb_image.h from github.com/nothings/stb into ~/include/stb/. Then"; \
	  echo "  export CPLUS_INCLUDE_PATH=~/include, and make again."; exit 1; }

# Each parser under AddressSanitizer and UBSan. Inputs that reach new code are kept in build/fuzz/corpus.
RUNS = 100000
READERS = picture sheet idx safetensors options
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

MNIST_FILES = train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1
MNIST = https://ossci-datasets.s3.amazonaws.com/mnist
build/mnist/%.gz:
	@mkdir -p build/mnist
	@echo "downloading $(MNIST)/$*.gz"
	@curl -fsSL $(MNIST)/$*.gz -o build/mnist/part || { \
	  echo "no download: is the network up, is curl there? Or put into build/mnist:"; \
	  printf '  %s-ubyte.gz\n' $(MNIST_FILES); exit 1; }
	@mv build/mnist/part $@
mnist: $(MNIST_FILES:%=build/mnist/%-ubyte.gz)
	@cd build/mnist && printf '%s  %s-ubyte.gz\n' \
	  db8f937d487057fb14a9f0fbe97f0bc8d311ab41b750d41e1ff37c43b9e55e19 train-images-idx3 \
	  51fc562b6747b666fbf6e84ce29d43c3cb5f9c388c664d43b33f02095313405a train-labels-idx1 \
	  cfeddb84311ecf044fc6a5b0f6ee8a24d265d4e83e388400186eb114082f4209 t10k-images-idx3 \
	  e41c74e484045d39b462a7790a4af51301bd9b0b24f0154798d713ec68c45920 t10k-labels-idx1 | \
	  $$(command -v sha256sum || echo shasum -a 256) -c || \
	  { echo "a file in build/mnist is damaged: delete it and run make mnist again"; exit 1; }
	@cd build/mnist; for file in $(MNIST_FILES:%=%-ubyte); do gunzip -c $$file.gz >$$file || exit 1; done
	@echo "Next: build/mp train --data build/mnist --lr 0.2 --epochs 5"
digits: | packages
	@mkdir -p build
	$(CXX) -std=c++17 -O2 -ffp-contract=off $(WARN) data/digits.cpp -o build/digits
	build/digits data

# The GPUs from a T4 on that this nvcc knows
GPUS = $(shell mkdir -p build/cuda; for a in 75 80 90a 100 120; do nvcc -x cu -arch=sm_$$a -cubin -o build/cuda/known /dev/null 2>/dev/null && \
  echo "-gencode arch=compute_$$a,code=sm_$$a"; done)
cuda-check: | packages
	@command -v nvcc >/dev/null || { echo "make cuda-check needs nvcc, from the CUDA Toolkit; it needs no GPU"; exit 1; }
	@mkdir -p build/cuda
	nvcc -x cu -std=c++17 -O3 -DMP_CUDA -Werror all-warnings -Xcompiler=-Wall,-Wextra,-Wshadow,-Werror --threads 0 \
	  $(GPUS) -c mp.cu -o build/cuda/mp.o
	$(CXX) -std=c++17 $(WARN) -Werror -O1 -DMP_CUDA -c tests.cpp -o build/cuda/tests.o
	nvcc build/cuda/tests.o build/cuda/mp.o -lcublas -o build/cuda/tests
# On a GPU, in ten minutes at most: rates, tests, memory errors, races; then a table of them for README.md
gpu:
	$(MAKE) BACKEND=cuda all build/tests
	-mkdir -p build/gpu; timeout 150 build/mp bench >build/gpu/bench
	-for net in 784,128,10 "784,8192,10 --batch 4096"; do for type in fp32 fp16 bf16; do build/mp train --epochs 3 --layers $$net \
	  --precision $$type | awk -v run="$$net $$type" '$$1 == 3 { print run ": " $$6 " images/s" }'; done; done >>build/gpu/bench
	-MP_PROGRAM=build/mp timeout 180 build/tests >build/gpu/tests
	-for tool in memcheck racecheck initcheck synccheck; do timeout 50 compute-sanitizer --tool $$tool build/tests \
	  -ts="E*,gemm*,train_step,unscale*,loss*,update*,stochastic*" -tce="K*" >build/gpu/$$tool; done
	@cd build/gpu; awk 'NR == 1 || /rung|images|^A.* 4096 .*(fp32 *tiled|mma)|cases:|SUMMARY/ { gsub(/ *[|] */, ", "); \
	  print "| " FILENAME " | " $$0 " |" } NR == 1 { print "| --- | --- |" }' bench tests *check

# ---- Exercises: the regions of mp.cu, emptied one by one. Their texts and hints are in walkthrough.md. ----
# A check builds for the CPU without optimising, and compiles the tests once for all exercises.
CLASS = $(CXX) -x c++ -std=c++17 $(WARN) -Wno-unused $(NATIVE) -pthread
ASAN = -fsanitize=address -DMP_ASAN
REGIONS = $(shell awk '$$1 == "//{" { print $$2 }' mp.cu)
X = build/exercise-$*
# What mp.cu and walkthrough.md say about the exercise $(1)
code = awk -v name=$(1) '$$1 == "//}" { inside = 0 } inside; $$1 == "//{" && $$2 == name { inside = 1 }'
heading = $$(sed "/^[*][*]Exercise $(1):/q" walkthrough.md | sed -n 's/^\#\#* //p' | tail -1)
title = $$(sed -n "s/^[*][*]Exercise $(1): \(.*\)[.][*][*].*/\1/p" walkthrough.md)
text = sed -n "/^[*][*]Exercise $(1):/,/^When it passes/p" walkthrough.md
task = $(text) | sed '/^When it passes/d; /^$$/d; s/[*][*]//g'
reason = $$($(text) | sed -n 's/^When it passes: //p')
hint = echo "hint $(2) of 2:"; sed -n "/summary>$(1), two hints</,/details>/p" walkthrough.md | \
  awk '/^[12][.] / { on = $$1 == "$(2)." } /^$$|^</ { on = 0 } on { print substr($$0, 4) }'
# Conditions of the rules below, each with what it says where it does not hold
KNOWN = test ! -L Makefile || { echo "this is an exercise: cd ../.. first"; exit 1; }; test -n "$(filter $*,$(REGIONS))" || { echo "there is no exercise $*; make exercises lists them"; exit 1; }
STARTED = test -d $(X) || { echo "$*: not started. make exercise-$* makes $(X) for you"; exit 1; }
MARKED = grep -Eq '//[{] $*( |$$)' $(X)/mp.cu || \
  { echo "$*: the lines //{ $* and //} are gone from $(X)/mp.cu: put them back"; exit 1; }
begun = { test -d build/exercise-$(1) && $(call code,$(1)) build/exercise-$(1)/mp.cu | grep -Evq '^ *(//.*)?$$'; }
WRITTEN = $(call begun,$*) || { echo "$*: not started: its region is still empty. make hint-$* helps"; exit 1; }
# Everything in its folder but mp.cu and walkthrough.md is the checkout's own.
LINKED = cd $(X) && ln -sf ../../Makefile ../../mp.h ../../tests.cpp ../../data .

exercises:
	@for name in $(REGIONS); do \
	  if ! $(call begun,$$name); then state="not started"; \
	  elif test build/exercise-$$name/passed -nt build/exercise-$$name/mp.cu; then state=done; else state=begun; fi; \
	  printf '%-11s  %-19s  %s\n' "$$state" $$name "$(call title,$$name)"; \
	done
	@echo "Begin one with make exercise-NAME. Then make check-NAME; make hint-NAME; make check-all"
exercise-%:
	@$(KNOWN); test ! -e $(X) || { echo "$(X) holds your work. To begin anew, first rm -r it"; exit 1; }
	@mkdir -p $(X); $(LINKED)
	@awk -v name=$* '$$1 == "//}" { inside = 0 } !inside; \
	  $$1 == "//{" && $$2 == name { inside = 1; sub(/\/\/.*/, "// your code"); print }' mp.cu > $(X)/mp.cu
	@awk '/^```$$/ { inside = 0 } !inside; /^<!-- region $* -->/ { here = 1 } \
	  /^```cpp/ && here { here = 0; inside = 1; print "// your code" }' walkthrough.md > $(X)/walkthrough.md
	@echo "$(PLACE)"; $(call task,$*); \
	echo "Write it in $(X)/mp.cu, line $$(sed -n '/\/\/ your code/=' $(X)/mp.cu)."; echo "Then make check-$*"
# First the verdict, then what the tests report, then what the program itself prints: 20 lines of it. Shared memory
# starts as NaN (MP_ORDER). After a crash the same tests run under AddressSanitizer, which knows the line.
check-%:
	@$(KNOWN); $(STARTED); $(MARKED); $(WRITTEN); $(LINKED); rm -f passed report
	@$(MAKE) -s build/class/tests.o && { test ! -t 1 || printf 'checking\r'; }
	@$(MAKE) -s $(X)/tests 2>$(X)/errors || \
	  { echo "$*: does not compile. Begin with the first error"; head -30 $(X)/errors; exit 1; }
	@cd $(X); $(LIMITED); { (exec ./tests $(ONLY) --out=report 2>&1); echo $$? >status; } 2>/dev/null | fold -w 76 | \
	  awk 'NR <= 20 { print "  | " $$0 } END { if (NR > 20) print "  | and " NR - 20 " more lines" }' >printed
	@case $$(cat $(X)/status) in \
	  0) why=done; ! grep -q '^  HERE' $(X)/report || why="not yet right: it ended in the middle of a test";; \
	  1) why="not yet right";; \
	  152) why="stopped after $(LIMIT) s of computing: endless loop? much printed?";; \
	  *) why="crashed: row, column or count beyond an array?";; \
	esac; \
	ended=$$(sed -n 's/^  | block (.*: \([^(]*\).*/\1/p' $(X)/printed); test -z "$$ended" || why="stopped: $$ended"; \
	echo "$*: $$why"; echo "$(X)/mp.cu:$$(sed -n '/\/\/{ $*/=' $(X)/mp.cu)"; echo "$(PLACE)"; \
	cat $(X)/errors $(X)/report; \
	test ! -s $(X)/printed || { echo "Printed by the program:"; cat $(X)/printed; }; \
	case $$why in \
	  done) exit;; \
	  not*) echo "Edit the region and check again; make hint-$* gives two hints"; exit 1;; \
	  crashed*) echo "Looking for the line, under AddressSanitizer:"; $(FIND);; \
	esac; \
	echo "In a debugger: cd $(X)"; echo "MP_THREADS=1 gdb -ex run --args ./tests -ts=$* --no-breaks"; exit 1
	@touch $(X)/passed; echo "Why it matters: $(call reason,$*)" | fold -s -w 79
	@next=$$(printf '%s\n' $(REGIONS) | sed -n '/^$*$$/{n;p;}'); test -z "$$next" || echo "Next: make exercise-$$next"
PLACE = walkthrough.md, $(call heading,$*)
ONLY = --test-suite=$* --reporters=student
LIMIT = $(if $(findstring gemm,$*),90,30)
LIMITED = ulimit -c 0; ulimit -S -t $(LIMIT); export MP_ORDER=forward
# The innermost two lines of mp.cu, without those of Matrix and of what it calls
FIND = $(MAKE) -s $(X)/tests-asan >$(X)/asan 2>&1; \
  { (cd $(X); $(LIMITED) MP_THREADS=1; exec ./tests-asan $(ONLY) --out=/dev/null >/dev/null 2>asan); } 2>/dev/null; \
  sed -nE '/ERROR: Addr/,/^$$/s/^ *\#.* in (void )?([A-Za-z0-9_]+).*(mp.cu:[0-9]+).*/  \3, in \2/p' $(X)/asan | \
    grep -Ev ' (Matrix|load|store|auto|with_type)$$' | head -2 | grep . || echo "  not found"
# All exercises begun here, or a row for each of several checkouts
check-all:
ifdef FOLDERS
	@echo "Exercises $(firstword $(REGIONS)) to $(lastword $(REGIONS)): + done, x fails, . not started"
	@for folder in $(FOLDERS); do \
	  $(MAKE) -s -C $$folder check-all FOLDERS= | awk -v folder=$$folder '{ seconds += $$3 } \
	    { marks = marks ($$2 == "done" ? "+" : $$2 == "fails" ? "x" : ".") } \
	    END { printf "%-36s %s %2d of %d, %4d s\n", folder, marks, gsub(/[+]/, "+", marks), NR, seconds }'; \
	done
else
	@for name in $(REGIONS); do \
	  begin=$$(date +%s); $(call begun,$$name) || { printf '%-20s not started\n' $$name; continue; }; \
	  why=$$($(MAKE) -s check-$$name 2>/dev/null) && state=done || state=fails; \
	  why=$$(echo "$$why" | sed -n "s/^$$name: \(done\)*//p"); \
	  printf '%-20s %-6s %4d s   %.46s\n' $$name $$state $$(($$(date +%s) - begin)) "$$why"; \
	done
endif
# The first call gives hint 1, a further one hint 2 as well.
hint-%:
	@$(KNOWN); $(STARTED); $(call hint,$*,1)
	@test ! -e $(X)/hinted || { $(call hint,$*,2); echo "The code: $(PLACE)"; }; touch $(X)/hinted
build/class/tests.o build/class/tests-asan.o: tests.cpp mp.h | packages
	@mkdir -p build/class; echo "compiling the tests, once for all exercises"
	$(CLASS) $(if $(findstring asan,$@),$(ASAN),-O1) -c tests.cpp -o $@
build/%/tests: build/%/mp.cu mp.h build/class/tests.o
	$(CLASS) -g -I. $< -x none build/class/tests.o -o $@
build/%/tests-asan: build/%/mp.cu mp.h build/class/tests-asan.o
	$(CLASS) -g $(ASAN) -I. $< -x none build/class/tests-asan.o -o $@

# Copies each region into walkthrough.md, after the line <!-- region NAME -->.
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
