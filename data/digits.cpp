// digits.cpp draws the digits that mp learns by default: white on black, 28x28 pixels, after the manner of MNIST.
//
//     g++ -std=c++17 -O2 -ffp-contract=off data/digits.cpp -o build/digits && build/digits data
//
// A digit begins as a few points on a pen's way, a skeleton (section 2). The points are shaken, slanted and bent, and
// smooth curves laid through them (section 3). A round pen draws the curves, and the picture is sized and centred as
// MNIST's are (section 4). A sheet has 100 digits a row, and row r holds only the digit r mod 10: whoever opens the
// picture sees the labels (section 5). Ten pictures as of a camera are there to try the reader on (section 6).
//
// A seed gives the same pixels with every compiler: the random numbers are made here, of libm only floor and sqrt are
// used, which are exact everywhere, and -ffp-contract=off forbids fused multiply-adds, which round differently.
#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#define STBI_WRITE_NO_STDIO
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_image_write.h>

// ==== 1. Random numbers =============================================================================================

struct Random {
  uint64_t state;

  uint64_t bits() {  // splitmix64: a counter, well stirred
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  double operator()(double from, double to) {  // evenly between the two, so that code reads `width = any(.4, .8)`
    return from + (to - from) * (bits() >> 11) / 9007199254740992.0;  // 53 bits over 2^53
  }
  bool chance(double probability) { return (*this)(0, 1) < probability; }
  double normal() {  // near enough to a bell curve of mean 0 and variance 1: four numbers of variance 1/3 added
    double sum = 0;
    for (int i = 0; i < 4; i++) sum += (*this)(-1, 1);
    return sum * 0.8660254037844386;  // sqrt(3/4)
  }
};

// ==== 2. Skeletons ==================================================================================================
// x runs to the right, y down; a digit is about 1 high, with its left edge near x = 0 and its top near y = 0. No
// expression draws two random numbers, since C++ leaves their order open; between braces it is left to right.

struct Point {
  double x, y;
  bool corner = false;  // the curve may turn sharply here
};
using Stroke = std::vector<Point>;     // drawn without lifting the pen
using Skeleton = std::vector<Stroke>;  // a digit

Stroke operator+(Stroke first, const Stroke& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

// The point of the unit circle that many turns clockwise from its top, right to three decimals, from the series of
// sine and cosine: those of libm differ between machines.
Point on_circle(double turns) {
  double quarters = 4 * (turns - std::floor(turns)), a = 1.5707963267948966 * (quarters - std::floor(quarters));
  double sine = a * (1 - a * a / 6 * (1 - a * a / 20 * (1 - a * a / 42)));
  double cosine = 1 - a * a / 2 * (1 - a * a / 12 * (1 - a * a / 30 * (1 - a * a / 56)));
  Point p = {sine, -cosine};
  for (int i = 1; i <= quarters; i++) p = {-p.y, p.x};
  return p;
}

// Points that belong together share a line below:
// clang-format off

Skeleton zero(Random& any) {  // a ring, begun near the top; not always closed, sometimes overlapping
  double radius = any(.25, .52), start = any(-.12, .15), turns = any(.93, 1.1);
  int points = int(turns * 8 + .5);
  Stroke ring;
  for (int i = 0; i <= points; i++) {
    Point p = on_circle(start - turns * i / points);
    ring.push_back({radius + radius * p.x, .5 + .5 * p.y});
  }
  ring[0].x += any(-.08, .08);
  ring[0].y += any(-.04, .12);
  return {ring};
}

Skeleton one(Random& any) {  // a bar, now and then with a flag at its head, and then often a foot
  double top = any(-.05, .05);
  bool flagged = any.chance(.12);
  Stroke flag, foot;
  if (flagged) flag = {{top - any(.1, .35), any(.12, .32)}};
  Stroke bar = {{top, 0, true}, {any(-.04, .04), .5}, {0, 1}};
  if (any.chance(flagged ? .6 : .02)) foot = {{-any(.15, .4), any(.97, 1.03)}, {any(.15, .4), any(.95, 1.01)}};
  return {flag + bar, foot};
}

Skeleton two(Random& any) {  // a hook that ends in a diagonal, a corner or a loop, a tail along the base
  double width = any(.4, .8), base = any(.85, 1);
  Stroke hook = {{any(-.05, .15), any(.08, .4)}, {width * any(.3, .6), 0},
                 {width, any(.15, .32)}, {width * any(.5, .85), any(.48, .68)}};
  Stroke turn;
  if (any.chance(.55)) {
    turn = {{any(-.05, .1), base, true}};
    if (any.chance(.5)) turn.push_back({width * .6, base - any(-.04, .06)});
  } else {
    double x = any(-.1, .12), size = any(.06, .18);
    turn = {{x + size, base}, {x - size * .6, base - size * any(0, .6)},
            {x + size * any(.2, .9), base - size * any(1.2, 2.2)},
            {x + size * any(2.2, 3.5), base - size * any(.2, .8)}};
  }
  Stroke tail = {{width + any(-.05, .55), base + any(-.15, .1)}};
  return {hook + turn + tail};
}

Skeleton three(Random& any) {  // two bows that meet in a corner; the upper one may have a flat top
  double width = any(.5, .75), middle = any(.4, .52), notch = any(.15, .45);
  bool flat = any.chance(.25);
  Stroke top = flat ? Stroke{{any(0, .1), any(0, .08)}, {width, any(-.02, .05), true}}
                    : Stroke{{any(0, .12), any(.06, .22)}, {width * .5, 0}, {width * any(.9, 1), any(.13, .22)}};
  Stroke belly = {{width * notch + .1, middle, true}, {width * any(.75, .95), middle + any(.03, .08)},
                  {width * any(.95, 1.2), any(.68, .8)}, {width * any(.45, .6), 1}, {any(-.12, .1), any(.82, .96)}};
  return {top + belly};
}

Skeleton four(Random& any) {  // an arm and the crossbar in one stroke, then the stem
  double bar = any(.45, .68), width = any(.45, .7), top = any(-.05, .2);
  Stroke arm;
  if (any.chance(.2)) {  // closed: from the stem's top to the crossbar
    arm = {{width + any(-.05, .05), top}, {any(0, .08), bar, true}};
  } else if (any.chance(.6)) {  // upright, with a corner
    arm = {{any(.05, .3), any(0, .15)}, {any(.02, .15), bar * .6}, {any(0, .05), bar, true}};
  } else {  // upright, with a bow
    arm = {{any(.05, .3), any(0, .1)}, {any(0, .05), bar * .7}, {any(.12, .2), bar}};
  }
  Stroke crossbar = {{width * .6, bar + any(-.04, .04)}, {width + any(-.03, .35), bar + any(-.12, .05)}};
  Stroke stem = {{width, top}, {width + any(-.07, .03), .55}, {width + any(-.12, .05), 1}};
  return {arm + crossbar, stem};
}

Skeleton five(Random& any) {  // the bar from right to left, the neck, the belly
  double width = any(.5, .75), neck = any(.32, .46), left = any(.02, .2);
  Stroke bar = {{width + any(0, .35), any(-.06, .08)}, {left + any(.02, .12), any(0, .08), true}};
  Stroke belly = {{left, neck, any.chance(.6)}, {width * any(.55, .75), neck + any(-.06, .06)},
                  {width, any(.58, .75)}, {width * any(.5, .65), any(.94, 1)}, {any(-.15, .1), any(.85, 1)}};
  return {bar + belly};
}

Skeleton six(Random& any) {  // a long back, then a loop
  double width = any(.42, .7), top = any(.45, .65);
  Stroke back = {{width * any(.6, 1.1), 0}, {width * any(.18, .4), any(.25, .4)}, {any(0, .04), any(.62, .75)}};
  Stroke loop = {{width * .42, 1}, {width, (1 + top) / 2 + .03}, {width * any(.5, .75), top},
                 {any(.02, .2), any(.72, .88)}};
  return {back + loop};
}

Skeleton seven(Random& any) {  // a bar, often with a hook at its left, and a leg, sometimes crossed
  double width = any(.45, .95), top = any(0, .1), foot = any(.1, .85) * width;
  bool hooked = any.chance(.4);
  Stroke start = hooked ? Stroke{{any(-.08, .05), top + any(.1, .4)}, {any(-.03, .05), top, any.chance(.7)}}
                        : Stroke{{0, top + any(-.02, .12)}};
  Stroke bar = {{width * .5, top + any(-.04, .05)}, {width, top - any(0, .06), any.chance(.7)}};
  Stroke leg = {{(width + foot) / 2 + any(-.08, .1), any(.4, .55)}, {foot, 1}};
  Stroke cross;
  if (any.chance(.15)) cross = {{foot - any(.05, .15), any(.5, .58)}, {width + any(-.05, .2), any(.45, .55)}};
  return {start + bar + leg, cross};
}

Skeleton eight(Random& any) {  // an S, closed by a way back up; the two ends cross, meet or stay apart
  double upper = any(.18, .36), lower = any(.15, .34), middle = any(.3, .4);  // half widths of the loops, their axis
  double waist = any(.38, .56), below = middle + any(-.1, .06), gap = any(-.12, .3);
  Stroke down = {{middle + upper * any(.7, 1) + gap * .4, any(.02, .22)}, {middle - upper * any(0, .4), 0},
                 {middle - upper, any(.14, .26)}, {middle + (below - middle) * .3, waist + any(-.03, .03)},
                 {below + lower, any(.68, .8)}};
  Stroke up = {{below - lower * any(-.2, .2), 1}, {below - lower, any(.7, .84)},
               {middle + any(-.05, .08), waist + any(-.02, .05)}, {middle + upper, any(.18, .3)},
               {middle + upper * any(.2, .9) + gap, any(-.05, .14)}};
  return {down + up};
}

Skeleton nine(Random& any) {  // a loop, closed at its right, then a tail that may curl to the left
  double width = any(.35, .8), base = any(.32, .6), foot = width * any(.2, 1.1);
  Stroke loop = {{width * any(.6, 1), any(.02, .15)}, {width * any(.4, .6), 0}, {0, base * any(.45, .7)},
                 {width * any(.3, .5), base}, {width * .9, base * any(.4, .7)}};
  Stroke tail = {{width * any(.9, 1.08), any(-.05, .18), any.chance(.7)},
                 {(width + foot) / 2 + any(0, .08), any(.5, .65)}, {foot, 1}};
  if (any.chance(.2)) tail.push_back({foot - any(.2, .4), any(.9, 1)});
  return {loop + tail};
}

// clang-format on
Skeleton (*const kSkeletons[10])(Random&) = {zero, one, two, three, four, five, six, seven, eight, nine};

// ==== 3. Deformation and curves, the same for all digits ============================================================

void deform(Skeleton& skeleton, Random& any) {
  double jitter = any(.015, .06);          // an unsteady hand
  double slant = .2 + .26 * any.normal();  // of the upright strokes, mostly to the right
  double tilt = .13 * any.normal();        // of the whole digit: the tangent of its angle
  double aspect = any(.7, 1.35), cosine = 1 / std::sqrt(1 + tilt * tilt), bend[6];
  for (double& b : bend) b = .14 * any.normal();
  for (Stroke& stroke : skeleton)
    for (Point& p : stroke) {
      double x = (p.x - .3 + jitter * any.normal()) * aspect;
      double y = p.y - .5 + jitter * any.normal();
      double bent_x = x + bend[0] * x * x + bend[1] * x * y + bend[2] * y * y;
      double bent_y = y + bend[3] * x * x + bend[4] * x * y + bend[5] * y * y;
      double slanted_x = bent_x - slant * bent_y;
      p.x = cosine * (slanted_x - tilt * bent_y);
      p.y = cosine * (bent_y + tilt * slanted_x);
    }
}

// A Catmull-Rom spline through the points: 8 short lines from each to the next. The direction at a point follows from
// both its neighbours; at a corner each side looks at its own neighbour alone.
Stroke smooth(const Stroke& points) {
  const int steps = 8;
  Stroke curve;
  for (size_t i = 0; i + 1 < points.size(); i++) {
    Point p1 = points[i], p2 = points[i + 1];
    Point p0 = i > 0 && !p1.corner ? points[i - 1] : p1;
    Point p3 = i + 2 < points.size() && !p2.corner ? points[i + 2] : p2;
    for (int k = i > 0; k <= steps; k++) {
      double t = double(k) / steps, t2 = t * t, t3 = t2 * t;
      double w0 = (2 * t2 - t3 - t) / 2, w1 = (3 * t3 - 5 * t2 + 2) / 2, w2 = (4 * t2 - 3 * t3 + t) / 2;
      double w3 = (t3 - t2) / 2;
      curve.push_back({w0 * p0.x + w1 * p1.x + w2 * p2.x + w3 * p3.x, w0 * p0.y + w1 * p1.y + w2 * p2.y + w3 * p3.y});
    }
  }
  return curve;
}

// ==== 4. Drawing ====================================================================================================
// As in MNIST, a digit is fitted into a box of 20x20 pixels, its proportions kept, and then moved by whole pixels until
// its centre of mass is in the middle of the tile. Lengths are in pixels from here on.

const int kTile = 28;

struct Pen {
  double radius;    // half the width of a stroke, here in its middle
  double fade;      // by that share the radius is smaller at a stroke's start and larger at its end
  double rim;       // width of the grey edge
  double strength;  // above 1 the grey is darker, below 1 paler
};

struct Tile {
  double ink[kTile][kTile] = {};  // [y][x], 0 to 1
};

void fit_into_box(Skeleton& curves, const Pen& pen) {
  double left = 1e9, right = -1e9, top = 1e9, bottom = -1e9;
  for (const Stroke& curve : curves)
    for (const Point& p : curve) {
      left = std::min(left, p.x), right = std::max(right, p.x);
      top = std::min(top, p.y), bottom = std::max(bottom, p.y);
    }
  double scale = (20 - 2 * pen.radius - .5 * pen.rim) / std::max(right - left, bottom - top);
  for (Stroke& curve : curves)
    for (Point& p : curve) {
      p.x = (p.x - (left + right) / 2) * scale + kTile / 2;
      p.y = (p.y - (top + bottom) / 2) * scale + kTile / 2;
    }
}

double distance(Point p, Point a, Point b) {  // from p to the line from a to b
  double dx = b.x - a.x, dy = b.y - a.y, length2 = dx * dx + dy * dy;
  double px = p.x - a.x, py = p.y - a.y;
  double along = length2 > 0 ? std::clamp((px * dx + py * dy) / length2, 0.0, 1.0) : 0;
  double ex = px - along * dx, ey = py - along * dy;
  return std::sqrt(ex * ex + ey * ey);
}

// Inks every pixel near the line from a to b by its distance; where lines overlap, the darkest counts.
void draw_line(Tile& tile, Point a, Point b, double radius, const Pen& pen) {
  double reach = radius + pen.rim / 2;
  int left = std::max(0, int(std::min(a.x, b.x) - reach));
  int right = std::min(kTile - 1, int(std::max(a.x, b.x) + reach));
  int top = std::max(0, int(std::min(a.y, b.y) - reach));
  int bottom = std::min(kTile - 1, int(std::max(a.y, b.y) + reach));
  for (int y = top; y <= bottom; y++)
    for (int x = left; x <= right; x++) {
      double depth = radius - distance({x + .5, y + .5}, a, b);  // of the pixel's centre
      double ink = std::clamp(pen.strength * (depth / pen.rim + .5), 0.0, 1.0);
      tile.ink[y][x] = std::max(tile.ink[y][x], ink);
    }
}

Tile centred(const Tile& tile) {
  double mass = 0, mass_x = 0, mass_y = 0;
  for (int y = 0; y < kTile; y++)
    for (int x = 0; x < kTile; x++) {
      mass += tile.ink[y][x];
      mass_x += tile.ink[y][x] * (x + .5);
      mass_y += tile.ink[y][x] * (y + .5);
    }
  int dx = int(std::floor(kTile / 2 - mass_x / mass + .5));
  int dy = int(std::floor(kTile / 2 - mass_y / mass + .5));
  Tile moved;
  for (int y = std::max(0, dy); y < std::min(kTile, kTile + dy); y++)
    for (int x = std::max(0, dx); x < std::min(kTile, kTile + dx); x++) moved.ink[y][x] = tile.ink[y - dy][x - dx];
  return moved;
}

Tile draw_digit(int digit, Random& any) {
  Skeleton skeleton = kSkeletons[digit](any);
  deform(skeleton, any);
  for (Stroke& stroke : skeleton) stroke = smooth(stroke);
  double radius = std::max(.65, 1.35 + .4 * any.normal()), rim = any(.8, 1.5), fade = any(-.25, .25);
  Pen pen = {radius, fade, rim, any(.95, 1.15)};
  fit_into_box(skeleton, pen);
  Tile tile;
  for (const Stroke& curve : skeleton)
    for (size_t i = 0; i + 1 < curve.size(); i++) {
      double fading = 1 + pen.fade * (2 * double(i) / curve.size() - 1);
      draw_line(tile, curve[i], curve[i + 1], pen.radius * fading, pen);
    }
  return centred(tile);
}

// ==== 5. Sheets =====================================================================================================

const int kColumns = 100;
const int kWidth = kColumns * kTile;

// A byte a pixel, 255 is white. Each digit has random numbers of its own, set by the sheet's stream and its place.
std::vector<uint8_t> draw_sheet(int digits, uint64_t stream) {
  std::vector<uint8_t> pixels(size_t(digits) * kTile * kTile);
  for (int i = 0; i < digits; i++) {
    Random any{stream * 1000000007u + i};
    any.state = any.bits();  // counters that start side by side would share their numbers
    int row = i / kColumns, column = i % kColumns;
    Tile tile = draw_digit(row % 10, any);
    uint8_t* corner = &pixels[size_t(row) * kTile * kWidth + column * kTile];
    for (int y = 0; y < kTile; y++)
      for (int x = 0; x < kTile; x++) corner[y * kWidth + x] = uint8_t(255 * tile.ink[y][x] + .5);
  }
  return pixels;
}

// A picture for readers: a corner of a sheet, one row of each digit
std::vector<uint8_t> corner_of(const std::vector<uint8_t>& sheet, int width) {
  std::vector<uint8_t> corner;
  for (int y = 0; y < 10 * kTile; y++)
    corner.insert(corner.end(), sheet.begin() + y * kWidth, sheet.begin() + y * kWidth + width);
  return corner;
}

// Writes under another name and renames at the end: a failure leaves the file that was there as it was.
template <class F> bool save_bytes(const std::string& path, F write) {
  const std::string unfinished = path + ".part";
  std::FILE* file = std::fopen(unfinished.c_str(), "wb");
  bool saved = file != nullptr;
  if (file) {
    saved = write(file) && !std::ferror(file);
    saved = std::fclose(file) == 0 && saved;
    saved = saved && std::rename(unfinished.c_str(), path.c_str()) == 0;
  }
  if (saved) {
    std::printf("wrote %s\n", path.c_str());
  } else {
    std::fprintf(stderr, "digits: cannot write %s: %s\n", path.c_str(), std::strerror(errno));
    if (file) std::remove(unfinished.c_str());
  }
  return saved;
}
bool save(const std::string& path, const std::vector<uint8_t>& pixels, int width) {
  return save_bytes(path, [&](std::FILE* file) {
    auto write = [](void* to, void* bytes, int size) { std::fwrite(bytes, 1, size, static_cast<std::FILE*>(to)); };
    return stbi_write_png_to_func(write, file, width, int(pixels.size()) / width, 1, pixels.data(), width) != 0;
  });
}

// ==== 6. Photographs ================================================================================================
// Ten pictures as a camera, a scanner or a drawing program would make them, one of each digit, for `mp predict`.

struct Photo {
  const char* name;
  int width, height;
  double x, y, size, pen;  // centre of the digit and its size as shares of the picture, width of the pen as one of that
  double blur, noise;      // pixels; steps of 255
  double light;            // the light falls by this share from the upper left to the lower right, and to the edges
  int paper[3], ink[3];    // red, green, blue
  enum Kind { jpeg, png, alpha, grey_16 } kind;
};

const Photo kPhotos[10] = {
    {"pencil.jpg", 640, 480, .5, .5, .6, .05, 1.5, 4, .3, {235, 235, 230}, {110, 110, 115}, Photo::jpeg},
    {"chalk.jpg", 360, 480, .45, .55, .5, .10, 3, 10, .3, {40, 70, 55}, {220, 225, 215}, Photo::jpeg},
    {"marker.jpg", 800, 600, .3, .6, .5, .20, 2, 5, .2, {250, 245, 235}, {200, 30, 40}, Photo::jpeg},
    {"transparent.png", 200, 300, .5, .5, .8, .10, 1, 0, 0, {255, 255, 255}, {0, 0, 0}, Photo::alpha},
    {"transparent_white.png", 256, 256, .6, .4, .5, .12, 1, 0, 0, {0, 0, 0}, {255, 255, 255}, Photo::alpha},
    {"scan_16_bits.png", 75, 100, .5, .5, .6, .08, 1, 1, .1, {240, 240, 240}, {30, 30, 30}, Photo::grey_16},
    {"far_away.jpg", 1280, 960, .8, .25, .15, .10, 2, 3, .4, {240, 220, 120}, {30, 40, 130}, Photo::jpeg},
    {"tiny.png", 22, 30, .5, .5, .9, .10, 1, 0, 0, {255, 255, 255}, {20, 20, 20}, Photo::png},
    {"pale.jpg", 500, 500, .5, .45, .55, .12, 4, 6, .15, {225, 190, 200}, {165, 120, 175}, Photo::jpeg},
    {"in_the_dark.jpg", 480, 480, .55, .5, .45, .12, 2, 8, .75, {200, 190, 170}, {40, 40, 50}, Photo::jpeg},
};

// Bytes as the file holds them: three channels, four with alpha, or one of two bytes, the higher one first
std::vector<uint8_t> take_photo(const Photo& photo, int digit, Random& any) {
  Skeleton curves = kSkeletons[digit](any);
  deform(curves, any);
  for (Stroke& stroke : curves) stroke = smooth(stroke);
  fit_into_box(curves, {0, 0, 0, 1});
  const double unit = photo.size * std::min(photo.width, photo.height) / 20;  // fit_into_box made it 20 high or wide
  const double left = photo.x * photo.width, top = photo.y * photo.height;
  std::vector<uint8_t> bytes;
  for (int y = 0; y < photo.height; y++)
    for (int x = 0; x < photo.width; x++) {
      const Point p = {(x + .5 - left) / unit + kTile / 2, (y + .5 - top) / unit + kTile / 2};
      double nearest = 1e9;
      for (const Stroke& curve : curves)
        for (size_t i = 0; i + 1 < curve.size(); i++) nearest = std::min(nearest, distance(p, curve[i], curve[i + 1]));
      const double ink = std::clamp((10 * photo.pen - nearest) * unit / photo.blur + .5, 0.0, 1.0);
      const double u = double(x) / photo.width - .5, v = double(y) / photo.height - .5;
      const double light = 1 - photo.light * (.5 + .35 * (u + v) + .3 * (u * u + v * v));
      const double noise = photo.noise * any.normal();
      if (photo.kind == Photo::alpha) {
        for (const int colour : photo.ink) bytes.push_back(uint8_t(colour));
        bytes.push_back(uint8_t(255 * ink + .5));
      } else if (photo.kind == Photo::grey_16) {
        const double grey = 257 * (light * (photo.paper[0] + ink * (photo.ink[0] - photo.paper[0])) + noise);
        for (const int byte : {int(grey) / 256, int(grey) % 256}) bytes.push_back(uint8_t(byte));
      } else {
        for (int i = 0; i < 3; i++) {
          const double colour = light * (photo.paper[i] + ink * (photo.ink[i] - photo.paper[i])) + noise;
          bytes.push_back(uint8_t(std::clamp(colour, 0.0, 255.0)));
        }
      }
    }
  return bytes;
}

bool save_photos(const std::string& folder, uint64_t seed) {
  for (int digit = 0; digit < 10; digit++) {
    const Photo& photo = kPhotos[digit];
    Random any{seed * 1000003u + digit};
    any.state = any.bits();
    const std::vector<uint8_t> pixels = take_photo(photo, digit, any);
    std::vector<uint8_t> file;
    const auto append = [](void* to, void* bytes, int size) {
      auto& all = *static_cast<std::vector<uint8_t>*>(to);
      all.insert(all.end(), static_cast<uint8_t*>(bytes), static_cast<uint8_t*>(bytes) + size);
    };
    const int channels = int(pixels.size()) / (photo.width * photo.height);
    if (photo.kind == Photo::jpeg) {
      stbi_write_jpg_to_func(append, &file, photo.width, photo.height, 3, pixels.data(), 40);
    } else {
      stbi_write_png_to_func(append, &file, photo.width, photo.height, channels, pixels.data(), 0);
    }
    if (photo.kind == Photo::grey_16) {  // stb writes 8 bits of grey and 8 of alpha; only the header knows that
      file[24] = 16, file[25] = 0;
      const unsigned crc = stbiw__crc32(&file[12], 17);
      for (int i = 0; i < 4; i++) file[29 + i] = uint8_t(crc >> (24 - 8 * i));
    }
    const std::string path = folder + "/" + std::to_string(digit) + "_" + photo.name;
    if (!save_bytes(path, [&](std::FILE* to) { return std::fwrite(file.data(), 1, file.size(), to) == file.size(); })) {
      return false;
    }
  }
  return true;
}

int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : "", number = argc > 2 ? argv[2] : "1";
  uint64_t seed = 0;
  auto [rest, error] = std::from_chars(number.data(), number.data() + number.size(), seed);
  bool whole = error == std::errc() && rest == number.data() + number.size();
  if (argc > 3 || folder.empty() || folder[0] == '-' || !whole) {
    std::fprintf(
        stderr,
        "usage: digits FOLDER [SEED]   draws FOLDER/train.png, test.png and digits.png, and ten pictures into\n"
        "FOLDER/photos, if that folder is there; SEED 1 if left out\n");
    return 2;
  }
  stbi_write_png_compression_level = 9;
  // Two streams for every seed, so that no seed's test digits are another's training digits.
  const std::vector<uint8_t> train = draw_sheet(20000, 2 * seed - 1), test = draw_sheet(2000, 2 * seed);
  bool saved = save(folder + "/train.png", train, kWidth) && save(folder + "/test.png", test, kWidth) &&
               save(folder + "/digits.png", corner_of(test, 24 * kTile), 24 * kTile);
  if (saved && std::filesystem::is_directory(folder + "/photos")) saved = save_photos(folder + "/photos", seed);
  return saved ? 0 : 1;
}
