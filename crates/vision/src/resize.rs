//! Bicubic resizing, bit-equal to Pillow's for 8-bit images.
//!
//! Two passes, each with rounding to 8 bits: weights of the cubic with a = -0.5, stretched when
//! shrinking, normalised, then fixed-point numbers with 22 bits behind the point. Only a window of the result
//! is computed, and the picture may lie on a larger canvas of one colour that never exists in memory, so that
//! no aspect ratio makes it expensive.

/// Bits behind the point of a weight: 32 less 8 for the pixel and 2 for sums beyond 1.
const PRECISION: u32 = 32 - 8 - 2;
/// Pixels that the cubic reaches to each side, at scale 1.
const SUPPORT: f64 = 2.0;
const CHANNELS: usize = 3;

/// A picture on a canvas of one colour.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Canvas<'a> {
    /// `[height, width, 3]` of the picture.
    pub pixels: &'a [u8],
    /// `(height, width)` of the picture.
    pub picture: (usize, usize),
    /// `(height, width)` of the canvas.
    pub size: (usize, usize),
    /// `(top, left)` of the picture on the canvas, which holds it whole.
    pub offset: (usize, usize),
    /// Colour of the rest.
    pub fill: [u8; CHANNELS],
}

/// Which part of a resized canvas is wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    /// `(height, width)` of the whole.
    pub whole: (usize, usize),
    /// `(top, left)` of the part.
    pub offset: (usize, usize),
    /// `(height, width)` of the part, inside of the whole.
    pub size: (usize, usize),
}

impl Window {
    /// All of it.
    pub(crate) fn all(height: usize, width: usize) -> Self {
        Self { whole: (height, width), offset: (0, 0), size: (height, width) }
    }
}

/// The window of the resized canvas, `[height, width, 3]`.
pub(crate) fn bicubic(canvas: Canvas<'_>, window: Window) -> Vec<u8> {
    let columns = Taps::new(canvas.size.1, window.whole.1, window.offset.1, window.size.1);
    let rows = Taps::new(canvas.size.0, window.whole.0, window.offset.0, window.size.0);
    if is_height_first(canvas, window) {
        let line_bytes = canvas.size.1 * CHANNELS;
        let low = resize_height(&rows, line_bytes, |row| &canvas.pixels[row * line_bytes..][..line_bytes]);
        let picture = (rows.len(), canvas.size.1);
        let canvas = Canvas { pixels: &low, picture, size: picture, ..canvas };
        return resize_width(canvas, &columns, (0, rows.len()));
    }
    let band = rows.reach();
    let narrow = resize_width(canvas, &columns, band);
    let line_bytes = window.size.1 * CHANNELS;
    let top = band.0.max(canvas.offset.0);
    // Rows of the canvas outside of the picture have its colour, which the first pass keeps.
    let fill = canvas.fill.repeat(window.size.1);
    let line = |row: usize| {
        let start = row.checked_sub(top).map(|row| row * line_bytes);
        start.and_then(|start| narrow.get(start..start + line_bytes)).unwrap_or(&fill)
    };
    resize_height(&rows, line_bytes, line)
}

/// Pillow's choice of the first pass since version 13; roundings between the passes depend on it. Canvases that
/// are larger than their picture are squares here, for which it never chooses the height.
fn is_height_first(canvas: Canvas<'_>, window: Window) -> bool {
    let lost = |input: usize, output: usize| input as i64 - output as i64;
    let (of_height, of_width) = (lost(canvas.size.0, window.whole.0), lost(canvas.size.1, window.whole.1));
    canvas.picture == canvas.size && of_height > 0 && of_height > 2 * of_width
}

/// For each output pixel of one direction the first input pixel and the weights from there on.
struct Taps {
    first: Vec<usize>,
    weights: Vec<i32>,
    /// Weights per output pixel, zeros behind those that count.
    stride: usize,
    /// How many count.
    lengths: Vec<usize>,
}

impl Taps {
    /// For the outputs `from..from + count` of `whole` outputs over `input` inputs.
    fn new(input: usize, whole: usize, from: usize, count: usize) -> Self {
        let scale = input as f64 / whole as f64;
        let stretch = scale.max(1.0);
        let support = SUPPORT * stretch;
        let stride = (support.ceil() as usize * 2 + 1).min(input);
        let mut taps = Self {
            first: Vec::with_capacity(count),
            weights: vec![0; stride * count],
            stride,
            lengths: Vec::with_capacity(count),
        };
        let mut exact = Vec::with_capacity(stride);
        for output in from..from + count {
            let center = (output as f64 + 0.5) * scale;
            // Towards zero, also where the sum is negative.
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            exact.clear();
            exact.extend((first..end).map(|at| cubic((at as f64 - center + 0.5) * (1.0 / stretch))));
            let sum: f64 = exact.iter().sum();
            let row = &mut taps.weights[taps.first.len() * stride..][..stride];
            for (weight, exact) in row.iter_mut().zip(&exact) {
                let exact = if sum == 0.0 { *exact } else { exact / sum };
                let fixed = exact * f64::from(1u32 << PRECISION);
                *weight = (fixed + if exact < 0.0 { -0.5 } else { 0.5 }) as i32;
            }
            taps.first.push(first);
            taps.lengths.push(end - first);
        }
        taps
    }

    /// The inputs that any output needs.
    fn reach(&self) -> (usize, usize) {
        let first = self.first.first().copied().unwrap_or(0);
        let end = self.first.iter().zip(&self.lengths).map(|(first, length)| first + length).max();
        (first, end.unwrap_or(first))
    }

    fn of(&self, output: usize) -> (usize, &[i32]) {
        (self.first[output], &self.weights[output * self.stride..][..self.lengths[output]])
    }

    fn len(&self) -> usize {
        self.first.len()
    }
}

fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

const HALF: i32 = 1 << (PRECISION - 1);

fn to_pixel(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// Resizes the width of the picture's rows that lie in `band` of the canvas: `[rows, outputs, 3]`.
fn resize_width(canvas: Canvas<'_>, columns: &Taps, band: (usize, usize)) -> Vec<u8> {
    let (height, width) = canvas.picture;
    let rows = band.0.max(canvas.offset.0)..band.1.min(canvas.offset.0 + height);
    let mut narrow = Vec::with_capacity(rows.len() * columns.len() * CHANNELS);
    let left = canvas.offset.1 * CHANNELS;
    let mut line = canvas.fill.repeat(canvas.size.1);
    for row in rows {
        let picture_row = (row - canvas.offset.0) * width * CHANNELS;
        line[left..][..width * CHANNELS].copy_from_slice(&canvas.pixels[picture_row..][..width * CHANNELS]);
        for output in 0..columns.len() {
            let (first, weights) = columns.of(output);
            let mut sums = [HALF; CHANNELS];
            let pixels = line[first * CHANNELS..].chunks_exact(CHANNELS);
            for (pixel, &weight) in pixels.zip(weights) {
                for (sum, &value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(value) * weight;
                }
            }
            narrow.extend(sums.map(to_pixel));
        }
    }
    narrow
}

/// Resizes the height of the picture that has these lines of `line_bytes`.
fn resize_height<'a>(rows: &Taps, line_bytes: usize, line: impl Fn(usize) -> &'a [u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows.len() * line_bytes);
    let mut sums = vec![0i32; line_bytes];
    for output in 0..rows.len() {
        let (first, weights) = rows.of(output);
        sums.fill(HALF);
        for (row, &weight) in (first..).zip(weights) {
            for (sum, &value) in sums.iter_mut().zip(line(row)) {
                *sum += i32::from(value) * weight;
            }
        }
        out.extend(sums.iter().map(|&sum| to_pixel(sum)));
    }
    out
}
