# make            builds build/mp: for CUDA where nvcc and a GPU are there, else for the CPU
# make run        learns the digits in data/;  make run ARGS="--precision fp32" passes options on
# make test       runs all tests;  make test SANITIZE=1 under AddressSanitizer and UBSan
# make plots      draws data/scale.svg, rate.svg and histogram.svg again
# make fuzz       throws RUNS=100000 inputs at each reader of files, with clang++;  make fuzz READERS=gz, at one
# make mnist      downloads MNIST into build/mnist;  make digits draws data/ again
# make exercises  lists the exercises: pieces of mp.cu for you to write, each with a check and two hints
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
  OPT += -DMP_PORTABLE_FIBERS -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2
endif
FLAGS = -std=c++17 $(WARN) $(OPT)
COMPILE = $(CXX) -x c++ $(FLAGS) -pthread
LINK = $(CXX) $(FLAGS) -pthread
ifeq ($(BACKEND),cuda)
  # The GPU's own number, such as 90
  ARCH ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d . | sed s/^90$$/90a/)
  ifeq ($(ARCH),)
    $(error no GPU answers nvidia-smi: make BACKEND=cpu, or name the GPU to build for, as in make BACKEND=cuda ARCH=75)
  endif
  COMPILE = nvcc -x cu -std=c++17 -O3 -arch=sm_$(ARCH) -DMP_CUDA -Xcompiler=-Wall,-Wextra,-Wshadow
  LINK = nvcc -arch=sm_$(ARCH) -lcublas
  FLAGS += -DMP_CUDA
endif

.PHONY: all run test plots mnist digits cuda-check gpu exercises walkthrough format clean FORCE
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

# Each reader of files, pictures and options, under AddressSanitizer and UBSan. Its corpus grows in build/fuzz.
RUNS = 100000
READERS = picture sheet idx gz safetensors options
.PHONY: fuzz
build/fuzz/mp: tests.cpp mp.cu mp.h Makefile | packages
	@command -v clang++ >/dev/null || { echo "make fuzz needs clang++ and its libFuzzer (Debian: clang, libclang-rt-dev)"; exit 1; }
	@mkdir -p build/fuzz
	clang++ -x c++ -std=c++17 $(WARN) -O1 -g $(NATIVE) -DMP_FUZZ -Wno-pass-failed -pthread -fsanitize=fuzzer,address,undefined \
	  -fno-sanitize-recover=undefined tests.cpp -o $@
fuzz: build/fuzz/mp $(B)/tests
	@MP_SEEDS=build/fuzz/corpus $(B)/tests --no-skip --test-suite=fuzz >/dev/null
	@for r in $(READERS); do \
	  MP_READER=$$r build/fuzz/mp -runs=$(RUNS) -max_len=4096 -rss_limit_mb=1024 -malloc_limit_mb=256 -timeout=10 -verbosity=0 \
	  -print_final_stats=1 -artifact_prefix=build/fuzz/$$r- build/fuzz/corpus/$$r >build/fuzz/log 2>&1 || \
	  { cat build/fuzz/log; echo "$$r: a finding; the input is in build/fuzz/$$r-*"; exit 1; }; \
	  echo "$$r: $$(sed -n 's/stat::number_of_executed_units: *//p' build/fuzz/log) inputs, no finding"; done

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
# What only a machine with a GPU can show: rates, tests, memory errors, races. Every part runs, whatever the one before said.
gpu:
	$(MAKE) BACKEND=cuda all build/tests
	-build/mp bench
	-for p in fp32 fp16 bf16; do build/mp train --epochs 3 --precision $$p; done
	-MP_PROGRAM=build/mp build/tests
	-compute-sanitizer --tool memcheck build/mp train --epochs 1 --batch 1000
	-for tool in memcheck racecheck synccheck; do \
	  compute-sanitizer --tool $$tool build/tests -ts="E*,gemm*,train_step,unscale*,loss*,update*,stochastic*"; done

# ---- Exercises: the regions of mp.cu, emptied one by one. Their titles, hints and reasons stand in walkthrough.md. ----
# A check builds for the CPU, not optimised and with the tests compiled once for all exercises: it answers in seconds.
CLASS = $(CXX) -x c++ -std=c++17 $(WARN) -Wno-unused $(NATIVE) -pthread
REGIONS = $(shell sed -n 's|^ *//{ \([^ ]*\).*|\1|p' mp.cu)
X = build/exercise-$*
LIMIT = 60
TIMED = $(or $(patsubst %,% -s ALRM,$(shell command -v timeout || command -v gtimeout)),perl -e 'alarm shift; exec @ARGV') $(LIMIT)
KNOWN = test -n "$(filter $*,$(REGIONS))" || { echo "no exercise is called $*; make exercises lists them"; exit 1; }
STARTED = test -d $(X) || { echo "$*: not started. make exercise-$* makes $(X) for you"; exit 1; }
# Ends with 0 if the region holds code, 1 if it holds none, 2 if its markers are gone.
HAS_CODE = awk -v name=$$name '/^ *\/\/[}]/ { inside = 0 } inside && !/^ *(\/\/.*)?$$/ { code = 1 } \
  /^ *\/\/[{] / && $$2 == name { inside = seen = 1 } END { exit !seen ? 2 : !code }' build/exercise-$$name/mp.cu
# What walkthrough.md says of an exercise: its heading, its title, its reason, a hint.
SAYS = awk -v name=$$name -v what="$$what" '/^\#/ { heading = $$0; sub(/^\#+ /, "", heading) } /^\*\*Exercise / { mine = ($$2 == name ":") } \
  mine && what == "heading" { print heading; exit } \
  mine && what == "title" { sub(/^\*\*Exercise [^ ]* /, ""); sub(/\.?\*\*.*/, ""); print; exit } \
  mine && what == "why" && sub(/^When it passes: /, "") { print; exit } \
  /^<\/details>/ { inside = hint = 0 } inside && /^[12]\. / { hint = "hint " substr($$0, 1, 1); sub(/^[12]\. /, "") } \
  inside && hint == what { print } index($$0, "<details><summary>" name ", two hints<") { inside = 1 }' walkthrough.md
exercises:
	@for name in $(REGIONS); do at=build/exercise-$$name; what=title; \
	  if ! test -d $$at || ! $(HAS_CODE); then state="not started"; \
	  elif test $$at/passed -nt $$at/mp.cu; then state=done; \
	  elif test $$at/tried -nt $$at/mp.cu; then state="tried, fails"; else state="not checked"; fi; \
	  printf '%-12s  %-19s  %s\n' "$$state" $$name "$$($(SAYS))"; done
	@echo "Begin one with make exercise-NAME; edit build/exercise-NAME/mp.cu; make check-NAME; make hint-NAME"
exercise-%:
	@$(KNOWN)
	@test ! -e $(X) || { echo "$(X) holds your work and stays. To begin anew: rm -r $(X), then make exercise-$*"; exit 1; }
	@mkdir -p $(X) && cp Makefile mp.h tests.cpp walkthrough.md $(X) && ln -s ../../data $(X)/data
	@awk -v name=$* '/^ *\/\/[}]/ { inside = 0 } !inside { print } /^ *\/\/[{] / && $$2 == name \
	  { inside = 1; sub(/\/\/.*/, "// your code"); print }' mp.cu > $(X)/mp.cu
	@name=$*; what=title; echo "$*: $$($(SAYS))"; what=heading; echo "walkthrough.md, $$($(SAYS))"; \
	  echo "Write your code in $(X)/mp.cu, line $$(grep -n '// your code' $(X)/mp.cu | cut -d: -f1), between //{ $* and //}; then make check-$*"
check-%:
	@$(KNOWN)
	@$(STARTED)
	@name=$*; $(HAS_CODE); case $$? in \
	  1) echo "$*: not started: the region in $(X)/mp.cu is still empty. make hint-$* helps"; exit 1;; \
	  2) echo "$*: the lines //{ $* and //} are gone from $(X)/mp.cu: put them back around your code"; exit 1;; esac
	@$(MAKE) -s build/class/tests.o
	@name=$*; what=heading; touch $(X)/tried; rm -f $(X)/passed; \
	echo "$*   $(X)/mp.cu:$$(grep -n '^ *//{ $*\( \|$$\)' $(X)/mp.cu | cut -d: -f1)   walkthrough.md, $$($(SAYS))"; cd $(X); \
	tests=../class/tests.o; cmp -s mp.h ../../mp.h && cmp -s tests.cpp ../../tests.cpp || \
	  { tests=tests.o; $(CLASS) -O1 -c tests.cpp -o tests.o || exit 1; }; \
	$(CLASS) -O0 -g -c mp.cu -o mp.o 2>errors || { head -30 errors; echo "$*: mp.cu does not compile. Begin with the first error"; exit 1; }; \
	cat errors; $(CXX) -pthread $$tests mp.o -o tests || exit 1; \
	$(TIMED) ./tests --test-suite=$* --reporters=student; \
	case $$? in 0) ;; \
	  124|142) echo "$*: stopped after $(LIMIT) seconds: a loop that never ends, or threads that wait for each other?"; exit 1;; \
	  135|136|137|138|139) echo "$*: crashed. Where? gdb -ex run --args $(X)/tests --test-suite=$*"; \
	    echo "Or: cd $(X) && make test SANITIZE=1 ARGS=--test-suite=$*, which names the line that read or wrote too far"; exit 1;; \
	  *) echo "$*: not yet right. Edit the region, then make check-$* again; make hint-$* (two hints)"; exit 1;; esac; \
	touch passed; cd ../..; what=why; echo "$*: done; $$($(SAYS))"; \
	following=$$(echo $(REGIONS) | awk -v name=$* '{ for (i = 1; i < NF; i++) if ($$i == name) print $$(i + 1) }'); test -z "$$following" || echo "Next: make exercise-$$following"
hint-%:
	@$(KNOWN)
	@$(STARTED)
	@name=$*; n=$$(cat $(X)/hinted 2>/dev/null || echo 1); echo $$((n + 1)) > $(X)/hinted; \
	for i in 1 2; do test $$n -ne $$i -a $$n -lt 3 || { what="hint $$i"; echo "$$what of 2:"; $(SAYS) | sed '/^$$/d' | fold -s -w 100; }; done; \
	what=heading; test $$n -lt 3 || echo "There is no third hint. The code itself stands in walkthrough.md, $$($(SAYS))"
build/class/tests.o: tests.cpp mp.h | packages
	@mkdir -p build/class
	@echo "compiling the tests, once for all exercises"
	$(CLASS) -O1 -c tests.cpp -o $@
# A variant of mp.cu in a folder of its own, for .ci/run
build/class/%/tests: build/class/%/mp.cu mp.h build/class/tests.o
	$(CLASS) -O0 -w -I. -c $< -o build/class/$*/mp.o
	$(CXX) -pthread build/class/tests.o build/class/$*/mp.o -o $@

# The code blocks of walkthrough.md, from the regions they name: a line <!-- region NAME -->, then the block
walkthrough:
	@mkdir -p build
	@awk 'NR == FNR { if ($$0 ~ /^ *\/\/[}]/) name = ""; if (name) { line = $$0; if (!count[name]++) indent = match(line, /[^ ]/); \
	    code[name] = code[name] substr(line, indent) "\n" } if ($$0 ~ /^ *\/\/[{] /) { name = $$2; times[name]++ } next } \
	  /^```/ && skip { skip = 0 } !skip { print } \
	  /^<!-- region / { name = $$3; shown[name]++ } \
	  /^```cpp/ && name { if (times[name] != 1) { print "walkthrough.md: mp.cu has no one region " name | "cat >&2"; bad = 1 } \
	    printf "%s", code[name]; skip = 1; name = "" } \
	  END { for (name in times) if (shown[name] != 1) { print "walkthrough.md: region " name " is shown " shown[name] + 0 " times" | "cat >&2"; bad = 1 } \
	    exit bad }' mp.cu walkthrough.md > build/walkthrough.md
	@cmp -s build/walkthrough.md walkthrough.md || cp build/walkthrough.md walkthrough.md
format:
	clang-format -i mp.h mp.cu tests.cpp data/digits.cpp
clean:
	rm -rf build
