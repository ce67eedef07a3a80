# The build of a small kernel, alike wherever it is made. Runs behind lib.sh and tools.sh, whose /work has the tree in linux/.
# BUILD: what to make of it. COMPILE: how: `anew`, or `reuse`, with the results of the reference's compiler.
# AROUND holds what is not part of the tree: /tmp of the tools.
AROUND=$SCRATCH/tmp
results=/tmp/ccache

# kernel_make ARGUMENTS…: nothing of what comes out says where and when, or whether the compiler had to run.
# A result is reused for the same source, headers and options by their content, as they were read now.
kernel_make() {
    local how=CCACHE_DIR=$results
    [ "$COMPILE" = reuse ] || how=CCACHE_DISABLE=1
    in_tools env "$how" CCACHE_COMPILERCHECK=none CCACHE_NOCOMPRESS=1 \
        make -s -j2 -C linux CC='ccache gcc' HOSTCC='ccache gcc' \
        KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=soak KBUILD_BUILD_HOST=soak "$@"
}

# kernel_build: configured and made
kernel_build() {
    must "make tinyconfig" kernel_make tinyconfig
    # shellcheck disable=SC2086 # one word per target
    must "make $BUILD" kernel_make $BUILD
}

# kernel_reuse: how often a result was there
kernel_reuse() { in_tools env CCACHE_DIR=$results ccache --show-stats; }

# sums DIR: of every file below, by name
sums() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum); }
