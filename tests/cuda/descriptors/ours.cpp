// Compares the descriptors of BoxedTile with those that CuTe makes for the same tiles (theirs.cpp). Prints how many it
// compared, and those that differ.
#include <cstdio>
#include <cstdlib>

#include "cuda/cutlass/hopper.h"

uint64_t theirs_by_rows(int rows, int columns, void* data, int part, int k);
uint64_t theirs_by_columns(int rows, int columns, void* data, int panel, int k);

namespace {

int compared = 0, different = 0;

void compare(const char* what, uint64_t ours, uint64_t theirs) {
  ++compared;
  if (ours == theirs) return;
  ++different;
  std::printf("%s: %016llx, CuTe has %016llx\n", what, static_cast<unsigned long long>(ours),
              static_cast<unsigned long long>(theirs));
}

template <int ROWS, int D>
void compare_tile(char* data) {
  using Tile = fastbert::cuda::BoxedTile<ROWS, D>;
  const Tile tile{data};
  for (int part = 0; part < ROWS / 64; ++part)
    for (int k = 0; k < D / 16; ++k) compare("by rows", tile.by_rows(64 * part, k), theirs_by_rows(ROWS, D, data, part, k));
  for (int k = 0; k < ROWS / 16; ++k) {
    // Where there is one panel alone, the distance to the next is not read, and CuTe leaves it out.
    constexpr uint64_t kDistance = Tile::kPanels > 1 ? 0 : uint64_t{0x3fff} << 16;
    compare("by columns", tile.by_columns(k) & ~kDistance, theirs_by_columns(ROWS, D, data, -1, k));
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      compare("by columns of a panel", tile.by_columns(k, panel) & ~(uint64_t{0x3fff} << 16),
              theirs_by_columns(ROWS, D, data, panel, k));
  }
}

}  // namespace

int main() {
  char* const data = static_cast<char*>(std::aligned_alloc(1 << 18, 1 << 18));  // its lower 18 bits are 0
  for (int offset = 0; offset <= 96 << 10; offset += 96 << 10) {
    compare_tile<128, 32>(data + offset);
    compare_tile<128, 64>(data + offset);
    compare_tile<128, 128>(data + offset);
    compare_tile<64, 128>(data + offset);
  }
  std::printf("%d compared\n", compared);
  return different > 0;
}
