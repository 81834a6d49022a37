// What is wrong with the page on the screen it is on: an array of lines.
const faults = [];
const place = (element) => element.getBoundingClientRect();
const name = (element) => `<${element.localName}> ${element.textContent.trim().slice(0, 40)}`;

// It never scrolls sideways; what is wide scrolls in a box of its own.
const wide = document.documentElement.scrollWidth;
if (wide > window.innerWidth) faults.push(`${wide} pixels wide on ${window.innerWidth}`);

// Colors as [red, green, blue, opacity].
const color = (css) => {
  const parts = css.match(/[\d.]+/g).map(Number);
  return parts.length === 3 ? [...parts, 1] : parts;
};
const over = (top, under) => top.slice(0, 3).map((value, i) => value * top[3] + under[i] * (1 - top[3])).concat(1);
const background = (element) => {
  if (!element) return [255, 255, 255, 1];
  const own = color(getComputedStyle(element).backgroundColor);
  return own[3] === 1 ? own : over(own, background(element.parentElement));
};
// WCAG 2.1, "relative luminance" and "contrast ratio".
const luminance = (rgb) => {
  const linear = rgb.slice(0, 3).map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
const contrast = (a, b) => {
  const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (light + 0.05) / (dark + 0.05);
};

const drawn = (element) => element instanceof SVGElement;
for (const element of document.body.querySelectorAll("*")) {
  const text = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
  if (!text || ["title", "style", "script"].includes(element.localName)) continue;
  const style = getComputedStyle(element);
  const ground = background(element);
  const ratio = contrast(over(color(drawn(element) ? style.fill : style.color), ground), ground);
  if (ratio < 4.5) faults.push(`contrast of ${ratio.toFixed(1)}: ${name(element)}`);
  // Whichever way it is turned.
  const matrix = drawn(element) ? element.getScreenCTM() : { a: 1, b: 0 };
  const scale = Math.hypot(matrix.a, matrix.b);
  const size = parseFloat(style.fontSize) * scale;
  if (size < 8) faults.push(`letters of ${size.toFixed(1)} pixels: ${name(element)}`);
}
for (const mark of document.querySelectorAll(".mark")) {
  const ratio = contrast(color(getComputedStyle(mark).fill), background(mark));
  if (ratio < 2) faults.push(`contrast of ${ratio.toFixed(1)}: mark ${name(mark)}`);
}

for (const row of document.querySelectorAll("tr")) {
  const height = place(row).height;
  if (height > 100) faults.push(`${height.toFixed(0)} pixels tall: ${name(row)}`);
}

// Plots: words beside each other, all of them inside.
for (const plot of document.querySelectorAll("svg[role=img]")) {
  const texts = [...plot.querySelectorAll("text:not(.note)")];
  const whole = place(plot);
  for (const [i, text] of texts.entries()) {
    const a = place(text);
    if (a.left < whole.left || a.right > whole.right || a.top < whole.top || a.bottom > whole.bottom) {
      faults.push(`cut off: ${name(text)}`);
    }
    for (const other of texts.slice(i + 1)) {
      const b = place(other);
      if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) {
        faults.push(`one over the other: ${name(text)}, ${name(other)}`);
      }
    }
  }
}
return faults;
