//! Where a number lies on an axis.

/// An axis: even steps, or even factors.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    least: f64,
    most: f64,
    by_factors: bool,
}

impl Scale {
    /// From zero to the largest number, in even steps.
    pub fn from_zero(numbers: impl Iterator<Item = f64>) -> Self {
        let most = numbers.fold(0.0, f64::max);
        let step = step(most);
        Self {
            least: 0.0,
            most: ((most / step).ceil() * step).max(1e-9),
            by_factors: false,
        }
    }

    /// Between two numbers, in even steps.
    pub fn between(least: f64, most: f64) -> Self {
        Self {
            least,
            most: most.max(least + 1e-9),
            by_factors: false,
        }
    }

    /// Powers of ten around all numbers above zero.
    pub fn by_factors(numbers: impl Iterator<Item = f64>) -> Self {
        let above = numbers.filter(|number| *number > 0.0 && number.is_finite());
        let (least, most) = above.fold((f64::MAX, f64::MIN), |(least, most), number| {
            (least.min(number), most.max(number))
        });
        if least > most {
            return Self::by_factors([1.0, 10.0].into_iter());
        }
        let least = 10f64.powf(least.log10().floor());
        let most = 10f64.powf(most.log10().ceil()).max(least * 10.0);
        Self {
            least,
            most,
            by_factors: true,
        }
    }

    /// The part of the axis, from 0 to 1, that lies before the number.
    pub fn at(&self, number: f64) -> f64 {
        let share = if self.by_factors {
            (number.max(self.least) / self.least).log10() / (self.most / self.least).log10()
        } else {
            (number - self.least) / (self.most - self.least)
        };
        share.clamp(0.0, 1.0)
    }

    /// Round numbers on the axis.
    pub fn ticks(&self) -> Vec<f64> {
        if self.by_factors {
            let decades = (self.most / self.least).log10().round() as i32;
            return (0..=decades)
                .map(|power| self.least * 10f64.powi(power))
                .collect();
        }
        let step = step(self.most - self.least);
        let first = (self.least / step).ceil() as i64;
        let last = (self.most / step + 1e-9).floor() as i64;
        (first..=last).map(|index| index as f64 * step).collect()
    }
}

/// A round step that gives four to eight of them.
fn step(span: f64) -> f64 {
    let rough = span.max(1e-9) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let rounded = match rough / power {
        ..1.5 => 1.0,
        ..3.5 => 2.0,
        ..7.5 => 5.0,
        _ => 10.0,
    };
    rounded * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        let scale = Scale::from_zero([87.0].into_iter());
        assert_eq!(scale.ticks(), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        let scale = Scale::by_factors([3.0, 800.0, 0.0].into_iter());
        assert_eq!(scale.ticks(), [1.0, 10.0, 100.0, 1000.0]);
        assert!((scale.at(10.0) - 1.0 / 3.0).abs() < 1e-9);
        assert_eq!(Scale::between(-10.0, 30.0).ticks().first(), Some(&-10.0));
    }
}
