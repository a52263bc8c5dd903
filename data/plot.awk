# Draws what `mp compare --sweep` prints as an SVG: test accuracy over the swept option, a curve for each setting.
#   build/mp compare --sweep scale | awk -f data/plot.awk > scale.svg

function text(x, y, style, words) { print "<text x='" x "' y='" y "' " style ">" words "</text>" }

/^--/ {  # --loss-scale 0x1p-24: the rows that follow were trained with it
  option = $1
  split($2, part, "p")
  place[++places] = "2^" part[2]
}
places && /%/ {
  name = substr($0, 1, 23)
  sub(/ +$/, "", name)
  if (!(name in seen)) setting[++settings] = name
  seen[name] = 1
  match($0, /[0-9.]+%/)
  accuracy[name, places] = substr($0, RSTART, RLENGTH - 1)
}
END {
  if (!settings) exit 1  # mp has failed
  step = 640 / places  # pixels
  print "<svg xmlns='http://www.w3.org/2000/svg' viewBox='-40 0 700 285' font-size='12' font-family='sans-serif'>"
  print "<rect x='-40' width='100%' height='100%' fill='#fff'/>"
  for (y = 0; y <= 100; y += 20) {
    print "<path stroke='#ccc' d='M0 " 220 - 2 * y "h640'/>"
    text(-6, 224 - 2 * y, "text-anchor='end'", y)
  }
  for (i = 1; i <= places; i += places > 12 ? 4 : 1) text((i - 0.5) * step, 238, "text-anchor='middle'", place[i])
  split("#1f6fb4 #d9600f #2a8a3e #8d3fa8", colour, " ")
  for (s = 1; s <= settings; s++) {
    points = ""
    for (i = 1; i <= places; i++) points = points (i - 0.5) * step "," 220 - 2 * accuracy[setting[s], i] " "
    print "<polyline fill='none' stroke-width='2' stroke='" colour[s] "' points='" points "'/>"
    text(165 * (s - 1), 258, "font-weight='bold' fill='" colour[s] "'", setting[s])
  }
  text(0, 278, "", "Test accuracy in per cent over " option)
  print "</svg>"
}
