# Trains for 3 epochs with each value, a power of 2, of an option and with each setting, and draws the test accuracy as an
# SVG, a curve for each setting. `make plots` calls it so:
#   awk -f data/plot.awk "build/mp train --epochs 3" --lr -14 -2 "--precision fp16" "--precision bf16" > rate.svg

function text(x, y, style, words) { print "<text x='" x "' y='" y "' " style ">" words "</text>" }

BEGIN {
  option = ARGV[2]
  for (x = ARGV[3]; x <= ARGV[4]; x += 2) {
    place[++places] = "2^" x
    for (s = 5; s < ARGC; s++) {
      command = ARGV[1] " " ARGV[s] " " option " 0x1p" x " | tail -1"
      command | getline line
      close(command)
      print option " 2^" x " " ARGV[s] ": " line > "/dev/stderr"
      if (!sub(/^test accuracy /, "", line)) exit 1  # mp has failed
      accuracy[s, places] = line + 0
    }
  }
  step = 640 / places  # pixels
  print "<svg xmlns='http://www.w3.org/2000/svg' viewBox='-40 0 700 285' font-size='12' font-family='sans-serif'>"
  print "<rect x='-40' width='100%' height='100%' fill='#fff'/>"
  for (y = 0; y <= 100; y += 20) {
    print "<path stroke='#ccc' d='M0 " 220 - 2 * y "h640'/>"
    text(-6, 224 - 2 * y, "text-anchor='end'", y)
  }
  for (i = 1; i <= places; i += places > 12 ? 4 : 1) text((i - 0.5) * step, 238, "text-anchor='middle'", place[i])
  split("#1f6fb4 #d9600f #2a8a3e #8d3fa8", colour, " ")
  for (s = 5; s < ARGC; s++) {
    points = ""
    for (i = 1; i <= places; i++) points = points (i - 0.5) * step "," 220 - 2 * accuracy[s, i] " "
    print "<polyline fill='none' stroke-width='2' stroke='" colour[s - 4] "' points='" points "'/>"
    gsub(/--[a-z]+ /, "", ARGV[s])  # bf16 half
    text(165 * (s - 5), 258, "font-weight='bold' fill='" colour[s - 4] "'", ARGV[s])
  }
  text(0, 278, "", "Test accuracy in per cent over " option)
  print "</svg>"
}
